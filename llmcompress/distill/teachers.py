"""The teachers: opened, of one task, loaded when first needed, and what they predict on a batch.

    online   batch ──> teacher 1, teacher 2 … ──> Mixture ──> log-probabilities over V tokens      + hidden states, …
    cached   row numbers ─────────────────────> memory map ──> K tokens and all others together

The objective does not know which of the two it is given. A teacher that llmcompress quantized is run with the very
numbers that its codes stand for; one that another tool quantized, by transformers with that format's own package. Only
eager attention returns its probabilities; where they are needed a model is switched to it, and the report says so.

Shapes: B rows of a batch, S tokens, V vocabulary, K tokens kept, H hidden size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import quiet
from llmcompress.distill.cache import TeacherCache
from llmcompress.distill.losses import Combine, Mixture, shares
from llmcompress.distill.settings import DistillSettings
from llmcompress.errors import LLMCompressError, raise_all, third_party
from llmcompress.models.loading import best_device, load_model
from llmcompress.models.tasks import CAUSAL, Task, task_of
from llmcompress.report import FILE, FOLDER

Open = Callable[[str], Checkpoint]
"""How a checkpoint is opened by name, with what the recipe allows."""


@dataclass
class Teacher:
    """One teacher of weight above 0; `model` loads it on first use, `free` gives its memory back."""

    checkpoint: Checkpoint
    task: Task
    share: float
    attentions: bool
    notes: list[str] = field(default_factory=list)
    loaded: nn.Module | None = None
    num_parameters: int | None = None
    architecture: str | None = None

    def model(self) -> nn.Module:
        """The model, in eval mode and without gradients."""
        if self.loaded is None:
            self.loaded, notes = load(self.checkpoint, self.task, self.attentions)
            self.loaded.requires_grad_(False)
            self.notes += [note for note in notes if note not in self.notes]
            self.num_parameters = sum(parameter.numel() for parameter in self.loaded.parameters())
            self.architecture = type(self.loaded).__name__
        return self.loaded

    def free(self) -> None:
        """Forget the model."""
        self.loaded = None
        gc.collect()


@dataclass(frozen=True)
class Intermediates:
    """One teacher's hidden states [B, S, H] (embeddings first) and attention probabilities, by layer, and its share."""

    share: float
    hidden: Sequence[torch.Tensor]
    attentions: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Predictions:
    """What the teachers predict. target: log-probabilities [B, S, V], or [B, S, K + 1] of the tokens `ids` and the
    rest."""

    target: torch.Tensor | None
    ids_BSK: torch.Tensor | None = None
    intermediates: Sequence[Intermediates] = field(default_factory=tuple)


class PredictionSource(Protocol):
    """Where the teachers' predictions for a batch come from."""

    def predict(self, inputs: Mapping[str, torch.Tensor], rows_B: torch.Tensor) -> Predictions:
        """The predictions for a batch; `rows_B` are the numbers of its rows in the training data."""
        ...


@dataclass(frozen=True)
class Online:
    """Teachers (model and share) that are run on every batch. `vocabulary`: rows of logits that all models have."""

    teachers: Sequence[tuple[nn.Module, float]]
    task: Task
    vocabulary: int
    combine: Combine
    temperature: float
    hidden: bool
    attentions: bool

    def predict(self, inputs: Mapping[str, torch.Tensor], rows_B: torch.Tensor) -> Predictions:
        """See `PredictionSource`."""
        mixture: Mixture | None = None
        intermediates = []
        with torch.no_grad():
            for model, share in self.teachers:
                output = self.task.run(model, inputs, self.hidden, self.attentions)
                logits = self.task.predictions(output)
                if logits is not None:
                    mixture = mixture or Mixture(self.combine, self.temperature)
                    mixture.add(logits[..., : self.vocabulary], share)
                if self.hidden or self.attentions:
                    intermediates.append(Intermediates(share, output.hidden_states or (), output.attentions or ()))
            return Predictions(mixture.log_probs() if mixture else None, None, intermediates)


@dataclass(frozen=True)
class Cached:
    """Predictions that lie on disk."""

    cache: TeacherCache
    device: torch.device

    def predict(self, inputs: Mapping[str, torch.Tensor], rows_B: torch.Tensor) -> Predictions:
        """See `PredictionSource`."""
        kept = self.cache.ids_NSK.shape[1]
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else kept
        ids, target = self.cache.rows(rows_B, min(length, kept))
        return Predictions(target.to(self.device), ids.to(self.device))


def find_teachers(source: Checkpoint, settings: DistillSettings, open: Open, attentions: bool) -> list[Teacher]:
    """The teachers that have a weight, the first one first.

    Raises: LLMCompressError when they are for different tasks.
    """
    named = [(source, settings.weight), *((open(teacher.model), teacher.weight) for teacher in settings.teachers)]
    task = task_of(source)
    raise_all(
        [
            LLMCompressError(
                f"{checkpoint.name}: is for {task_of(checkpoint).name}, and the first teacher for {task.name}; both "
                "must be alike"
            )
            for checkpoint, _ in named[1:]
            if task_of(checkpoint) is not task
        ]
    )
    parts = shares([weight for _, weight in named])
    return [
        Teacher(checkpoint, task, share, attentions)
        for (checkpoint, _), share in zip(named, parts, strict=True)
        if share > 0
    ]


def load(checkpoint: Checkpoint, task: Task, attentions: bool) -> tuple[nn.Module, list[str]]:
    """The model in eval mode on the best device, and what there is to say about how it was loaded.

    Raises: LLMCompressError when it cannot be loaded, lacks weights, or has no attention that returns probabilities.
    """
    notes: list[str] = []
    if is_quantized(checkpoint) and task is CAUSAL and is_ours(checkpoint.folder):
        from llmcompress.compress.dequantized import load_dequantized

        notes.append(f"{checkpoint.name}: quantized ({_method(checkpoint)}); run with our own dequantized weights")
        model = load_dequantized(checkpoint.folder, torch.float32)
    else:
        if is_quantized(checkpoint):
            notes.append(
                f"{checkpoint.name}: quantized ({_method(checkpoint)}); run by transformers with that format's own "
                "package"
            )
        model = _load_plain(checkpoint, task)
    if attentions:
        notes += switch_to_eager(model, checkpoint.name)
    return model.to(best_device()).eval(), notes


def load_dense(checkpoint: Checkpoint, task: Task) -> nn.Module | None:
    """A model whose weights are all plain, to be cut from, of a checkpoint that another tool quantized; None where the
    checkpoint as it is loaded elsewhere is plain already.

    Raises: LLMCompressError when transformers cannot undo that quantization.
    """
    if not is_quantized(checkpoint) or (task is CAUSAL and is_ours(checkpoint.folder)):
        return None
    model: Any = _load_plain(checkpoint, task)
    with (
        third_party(
            f"{checkpoint.name}: cannot be cut, since transformers cannot undo its quantization",
            "give a student of its own (--student), or cut the original",
        ),
        quiet("transformers"),
    ):
        plain: nn.Module = model.dequantize()
    return plain.to(best_device()).float().eval()


def switch_to_eager(model: nn.Module, name: str) -> list[str]:
    """Switch a model to an attention that returns its probabilities; what was switched, as a note for the report.

    Raises: LLMCompressError when the model has none.
    """
    config: Any = model.config
    before = getattr(config, "_attn_implementation", None)
    if before == "eager":
        return []
    with third_party(
        f"{name}: its attention ({before}) returns no probabilities and cannot be switched to eager",
        "leave out the attention losses",
    ):
        model.set_attn_implementation("eager")  # type: ignore[operator]
    return [f"{name}: attention switched from {before} to eager, since {before} returns no probabilities"]


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether config.json says that the weights are quantized."""
    return bool(checkpoint.config.get("quantization_config"))


def is_ours(folder: Path) -> bool:
    """Whether llmcompress wrote the folder, so that its codes can be read by us."""
    return (folder / FOLDER / FILE).is_file()


def pooled(hidden_BSH: torch.Tensor, mask_BS: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per text [B, H]: the mean over its tokens, or its first token's; not normalized."""
    if pooling == "first":
        return hidden_BSH[:, 0]
    mask_BS1 = mask_BS[..., None].to(hidden_BSH.dtype)
    return (hidden_BSH * mask_BS1).sum(1) / mask_BS1.sum(1).clamp_min(1)


def _method(checkpoint: Checkpoint) -> object:
    return checkpoint.config["quantization_config"].get("quant_method")


def _load_plain(checkpoint: Checkpoint, task: Task) -> nn.Module:
    model: nn.Module = load_model(
        checkpoint.folder, task, trust_remote_code=checkpoint.trust_remote_code, name=checkpoint.name
    )
    return model
