"""Task: what a model is for, and everything that follows from it.

    task            transformers' class                     predicts                        its own metric
    causal          AutoModelForCausalLM                    the next token, at every token  perplexity
    masked          AutoModelForMaskedLM                    the masked tokens               perplexity
    classification  AutoModelForSequenceClassification      the class of a text             accuracy
    embedding       AutoModel, pooled as 1_Pooling says     nothing: its vector itself      cosine

`architectures` in config.json says which. A new task is one class here and its place in `TASKS`; whatever loads, feeds,
trains or measures a model asks its task and has no table of its own.

Shapes: B rows of a batch, S tokens of a row, V vocabulary or classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmcompress.checkpoint.files import read_json
from llmcompress.errors import LLMCompressError, unknown
from llmcompress.models.config import text_config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.models.blocks import DecoderLayers

Batch = Mapping[str, "torch.Tensor"]
"""Arguments of a model's forward, with `labels`."""
IGNORED = -100
"""The label of a prediction that does not count."""
TEXT_FIELDS = (("sentence1", "sentence2"), ("sentence",), ("text",))
"""Fields of a row that hold what an encoder reads; the first set that a row has counts."""
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


class Task(ABC):
    """One kind of model; see the module's docstring."""

    name: ClassVar[str]
    label: ClassVar[str]
    """What a sentence calls it, e.g. causal language model."""
    endings: ClassVar[tuple[str, ...]]
    """How the names of its architectures end."""
    auto_class: ClassVar[str]
    metric: ClassVar[Literal["perplexity", "accuracy", "cosine"]]
    row: ClassVar[str]
    """What a row of training data holds."""
    generates: ClassVar[bool] = False
    may_lack: ClassVar[tuple[str, ...]] = ()
    """Parts of the model that its files may lack, since nothing here uses them."""

    def transformers_class(self, config: Any = None) -> Any:
        """transformers' class that builds and loads such a model. config: transformers' own of the model, if known."""
        import transformers

        return getattr(transformers, self.auto_class)

    def from_config(self, config: Any, **kwargs: Any) -> Any:
        """A model of a config, with the weights that its constructor draws."""
        of = self.transformers_class(config)
        if hasattr(of, "from_config"):
            return of.from_config(config, **kwargs)
        return of._from_config(config, **{key: value for key, value in kwargs.items() if key != "trust_remote_code"})

    def blocks(self, model: nn.Module) -> DecoderLayers:
        """The repeated blocks, by their place in the model.

        Raises: LLMCompressError for a model without any.
        """
        from llmcompress.models.blocks import decoder_layers

        return decoder_layers(model)

    def run(self, model: nn.Module, inputs: Batch, hidden: bool = False, attentions: bool = False) -> Any:
        """The model's output on a batch, with hidden states and attention probabilities where they are asked for."""
        return model(**inputs, output_hidden_states=hidden, output_attentions=attentions)

    def predictions(self, output: Any) -> torch.Tensor | None:
        """Logits [B, S, V] of a model's output (a classifier's S is 1); None for a model that predicts nothing."""
        logits: torch.Tensor = output.logits
        return logits

    @abstractmethod
    def num_predicted(self, model: nn.Module) -> int:
        """V: entries of one prediction, 0 for a model that predicts nothing."""

    @abstractmethod
    def targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(which count, bool [B, S]; labels [B, S], IGNORED where there is none), in step with the logits."""

    def tokens_that_count(self, batch: Batch) -> torch.Tensor:
        """Tokens whose hidden states and attention are compared, bool [B, S]: the real ones."""
        return batch["attention_mask"].bool()

    def unusable(self, fields: Mapping[str, Any]) -> str | None:
        """Why a row of training data cannot be read for this task, or None."""
        names = next((names for names in TEXT_FIELDS if all(name in fields for name in names)), None)
        if names is None:
            return "no field 'sentence' or 'text'"
        if not all(isinstance(fields[name], str) and fields[name].strip() for name in names):
            return f"field {names[0]!r} is no text"
        return None

    def texts(self, fields: Mapping[str, Any]) -> list[str]:
        """What the tokenizer is given of a row: one text, or a pair."""
        names = next(names for names in TEXT_FIELDS if all(name in fields for name in names))
        return [str(fields[name]) for name in names]


class _LanguageModel(Task):
    metric = "perplexity"

    def num_predicted(self, model: nn.Module) -> int:
        head = model.get_output_embeddings()  # type: ignore[operator]
        return int(head.weight.shape[0]) if head is not None else int(text_config(model.config).vocab_size)


class CausalLM(_LanguageModel):
    """Predicts the next token at every token; its labels move one to the left to stand beside its logits."""

    name, label = "causal", "causal language model"
    endings = ("ForCausalLM", "LMHeadModel")
    auto_class = "AutoModelForCausalLM"
    row = "text, prompt and completion, instruction and output, or messages"
    generates = True

    def transformers_class(self, config: Any = None) -> Any:
        """The auto class; for what it has no entry for, and for every wrapper, the class that config.json declares.

        AutoModelForCausalLM has no entry for most wrappers, and for some it gives their text part alone: the names of
        its modules are then not those that engines see, which load what is declared.
        """
        import transformers

        known = transformers.AutoModelForCausalLM._model_mapping
        if config is not None and (text_config(config) is not config or type(config) not in known):
            declared = (getattr(transformers, str(name), None) for name in config.architectures or ())
            generating = (each for each in declared if isinstance(each, type))
            for each in generating:
                if issubclass(each, transformers.GenerationMixin):
                    return each
            mapping = transformers.AutoModelForImageTextToText._model_mapping
            if type(config) in mapping:
                return mapping[type(config)]
        return super().transformers_class(config)

    def run(self, model: nn.Module, inputs: Batch, hidden: bool = False, attentions: bool = False) -> Any:
        """As for every task; no cache is kept."""
        return model(**inputs, output_hidden_states=hidden, output_attentions=attentions, use_cache=False)

    def targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Task.targets`."""
        import torch

        labels_BS = batch["labels"]
        next_BS = torch.full_like(labels_BS, IGNORED)
        next_BS[:, :-1] = labels_BS[:, 1:]
        return next_BS != IGNORED, next_BS

    def tokens_that_count(self, batch: Batch) -> torch.Tensor:
        """Those whose next token has a label: no padding, no prompt."""
        return self.targets(batch)[0]


class MaskedLM(_LanguageModel):
    """Predicts the tokens that were masked; a teacher is followed at all real tokens."""

    name, label = "masked", "masked language model"
    endings = ("ForMaskedLM",)
    auto_class = "AutoModelForMaskedLM"
    row = "sentence or text"

    def targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Task.targets`."""
        return batch["attention_mask"].bool(), batch["labels"]


class SequenceClassification(Task):
    """Gives one of several classes to a text or a pair of texts."""

    name, label = "classification", "sequence classifier"
    endings = ("ForSequenceClassification",)
    auto_class = "AutoModelForSequenceClassification"
    metric = "accuracy"
    row = "sentence or text (or sentence1 and sentence2), and label"

    def predictions(self, output: Any) -> torch.Tensor:
        """Logits [B, 1, classes]."""
        logits: torch.Tensor = output.logits[:, None]
        return logits

    def num_predicted(self, model: nn.Module) -> int:
        """The number of classes."""
        return int(model.config.num_labels)  # type: ignore[union-attr, arg-type]

    def targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Task.targets`."""
        import torch

        labels_B1 = batch["labels"].reshape(-1, 1)
        return torch.ones_like(labels_B1, dtype=torch.bool), labels_B1

    def unusable(self, fields: Mapping[str, Any]) -> str | None:
        """See `Task.unusable`; a row needs its class."""
        label = fields.get("label")
        no_class = not isinstance(label, int) or label < 0
        return super().unusable(fields) or ("no class in field 'label' (0, 1, …)" if no_class else None)


class SentenceEmbedding(Task):
    """Gives a vector to a text, pooled from the hidden states of its tokens."""

    name, label = "embedding", "sentence encoder"
    endings = ("Model",)
    auto_class = "AutoModel"
    metric = "cosine"
    row = "sentence or text"
    may_lack = ("pooler", "position_ids")

    def run(self, model: nn.Module, inputs: Batch, hidden: bool = False, attentions: bool = False) -> Any:
        """As for every task; the hidden states are always there, since the last of them is what is pooled."""
        return super().run(model, inputs, True, attentions)

    def predictions(self, output: Any) -> None:
        """Nothing."""
        return

    def num_predicted(self, model: nn.Module) -> int:
        """Nothing is predicted."""
        return 0

    def targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """None count."""
        import torch

        mask_BS = batch["attention_mask"]
        return torch.zeros_like(mask_BS, dtype=torch.bool), torch.full_like(mask_BS, IGNORED)


TASKS: tuple[Task, ...] = (CausalLM(), MaskedLM(), SequenceClassification(), SentenceEmbedding())
"""Every task. An architecture belongs to the first one with an ending of its name."""
CAUSAL = TASKS[0]


def task(name: str) -> Task:
    """The task called `name`.

    Raises: LLMCompressError for an unknown one.

    >>> task("masked").auto_class
    'AutoModelForMaskedLM'
    """
    known = {each.name: each for each in TASKS}
    if name not in known:
        raise unknown("task", name, known)
    return known[name]


def task_of_architectures(architectures: Sequence[object]) -> Task | None:
    """The task of a config's `architectures`; None where no task has such a name.

    >>> task_of_architectures(["BertForMaskedLM"]).name, task_of_architectures(["ViTForImageClassification"])
    ('masked', None)
    """
    names = [str(name) for name in architectures]
    return next((each for name in names for each in TASKS if name.endswith(each.endings)), None)


def task_of(checkpoint: Checkpoint) -> Task:
    """The task of a checkpoint.

    Raises: LLMCompressError when its config names no architecture, or one of no task.
    """
    names = checkpoint.config.get("architectures") or []
    found = task_of_architectures(names)
    if found is None:
        shown = ", ".join(map(str, names)) or "nothing"
        endings = ", ".join(ending for each in TASKS for ending in each.endings)
        raise LLMCompressError(
            f"{checkpoint.name}: architectures in config.json is {shown}, which no task here is for",
            f"a model whose architecture ends in one of {endings}",
        )
    return found


def pooling_of(folder: Path) -> str:
    """How a sentence encoder makes one vector of a text: `mean` over its tokens, or the `first` one.

    Raises: LLMCompressError for another way, and a file that is not JSON.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    modes = [key for key, value in read_json(path).items() if value is True]
    ways = [POOLINGS[key] for key in modes if key in POOLINGS]
    others = [key for key in modes if key.startswith("pooling_mode_") and key not in POOLINGS]
    if len(ways) != 1 or others:
        raise LLMCompressError(f"{path}: pooling by {', '.join(modes)}; mean and cls_token, one of them, are supported")
    return ways[0]
