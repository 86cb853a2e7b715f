"""On-policy training by trl's GKD trainer: the one file that imports trl.

    prompt ──drawn with probability lmbda──> student writes on ──> its own text ──┐
       └────── else ───────────────────────> the data's answer ───────────────────┴──> loss of student against teacher

A student that only ever sees the data's text never learns to go on from its own mistakes (Agarwal et al. 2024,
"On-Policy Distillation of Language Models", https://arxiv.org/abs/2306.13649). trl draws, lets the student write, ends
its text at the first end token and runs the loop; the loss is the caller's, and equals trl's own where trl has it
(tests/unit/training/test_on_policy.py).

Two things of trl are changed. Text is filled up on the right, as everywhere here, so that models with absolute
positions see those that they will have. And the loss is the mean over the tokens that were written, where trl divides
by the number of tokens in the data's answer, which was not used.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn

from llmcompress.errors import LLMCompressError
from llmcompress.training.trainer import Engine, Guarded


@dataclass
class OwnText:
    """How much of the training was on the student's own text; a driver, so that an interruption does not forget it."""

    batches: int = 0
    student_batches: int = 0
    student_tokens: int = 0

    def start(self, total_steps: int) -> None:
        """See `llmcompress.training.trainer.Driver`."""

    def step(self, step: int) -> None:
        """See `llmcompress.training.trainer.Driver`."""

    def state(self) -> dict[str, Any]:
        """See `llmcompress.training.trainer.Driver`."""
        return {counter.name: getattr(self, counter.name) for counter in fields(self)}

    def restore(self, state: dict[str, Any]) -> None:
        """See `llmcompress.training.trainer.Driver`."""
        for name, value in state.items():
            setattr(self, name, value)


def require_trl() -> None:
    """Raises: LLMCompressError where trl is not installed."""
    try:
        _trl()
    except ImportError as error:
        first = str(error).splitlines()[0]
        raise LLMCompressError(
            f"on_policy: needs trl, which cannot be imported ({first})", "pip install 'llmcompress[train]'"
        ) from error


def own_text_engine(tokenizer: Any, padding: int, lmbda: float, max_new_tokens: int, temperature: float) -> Engine:
    """What `train` runs a student on its own text with. Batches must hold `prompts` and `prompt_attention_mask`, filled
    up on the left.

    lmbda: probability that a batch is the student's own text. temperature: of the sampling. The driver must be an
    `OwnText`.
    """
    gkd = _trl()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    how: dict[str, Any] = {"gradient_checkpointing": False}  # trl's own default is True
    how |= {"lmbda": lmbda, "max_new_tokens": max_new_tokens, "temperature": temperature}

    def arguments(**settings: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return gkd.GKDConfig(**(how | settings))

    return Engine(
        trainer=partial(_trainer(gkd.GKDTrainer), processing_class=tokenizer),
        arguments=arguments,
        rows=_dataset,
    )


def numbered(rows: Sequence[Any], batch: Callable[[Sequence[Any]], dict[str, torch.Tensor]]) -> Any:
    """A collator over what `own_text_engine` makes of `rows`: their places."""
    return lambda places: batch([rows[entry["place"]] for entry in places])


def untouched(model: nn.Module) -> Callable[[], None]:
    """What puts back the model's configs and forward, which trl changes for its own ends; call it after training."""
    whole: Any = model
    before = copy.deepcopy((whole.config, whole.generation_config))

    def restore() -> None:
        whole.config, whole.generation_config = before
        vars(whole).pop("forward", None)

    return restore


def to_the_left(
    ids_BS: torch.Tensor, mask_BS: torch.Tensor, labels_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same three with every row moved to the left by its filling; what was on the left comes behind."""
    skip_B1 = mask_BS.argmax(-1, keepdim=True)
    places_BS = (torch.arange(ids_BS.shape[1], device=ids_BS.device)[None] + skip_B1) % ids_BS.shape[1]
    return ids_BS.gather(1, places_BS), mask_BS.gather(1, places_BS), labels_BS.gather(1, places_BS)


def _trl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental import gkd
    return gkd


def _dataset(rows: Sequence[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"place": list(range(len(rows)))})


def _trainer(base: Any) -> Any:
    """trl's trainer with what is ours."""

    class OwnTextTrainer(Guarded, base):  # type: ignore[misc]
        def __init__(self, model: Any, driver: OwnText, **kwargs: Any) -> None:
            self.counted = driver
            teacher: Any = nn.Module()
            teacher.config = model.config  # trl compares vocabularies; teachers are the loss's
            super().__init__(model=model, teacher_model=teacher, driver=driver, **kwargs)
            self.model_accepts_loss_kwargs = False  # the loss is a mean already

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.counted.batches += 1
            return super().training_step(*args, **kwargs)

        def generate_on_policy_outputs(self, model: Any, inputs: Any, generation_config: Any) -> Any:
            ids_BS, mask_BS, labels_BS = base.generate_on_policy_outputs(model, inputs, generation_config)
            self.counted.student_batches += 1
            self.counted.student_tokens += int((labels_BS != -100).sum())
            return to_the_left(ids_BS, mask_BS, labels_BS)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """No card of trl's in a checkpoint."""

    return OwnTextTrainer
