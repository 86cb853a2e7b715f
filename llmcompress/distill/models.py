"""The two ends of a distillation, before anything is trained: which teachers, which student, and whether they fit.

teachers   opened, of one kind, loaded when first needed and freed when told to
student    a checkpoint │ a config, random weights │ cut from the first teacher │ quantized, trained on its grid
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.distill.kinds import Kind, kind_of
from llmcompress.distill.loading import dense, from_config, is_ours, is_quantized, load
from llmcompress.distill.mixture import shares
from llmcompress.distill.rows import Rows
from llmcompress.distill.settings import DistillSettings
from llmcompress.distill.shaping import student_from
from llmcompress.distill.teachers import Teacher
from llmcompress.errors import LLMCompressError, raise_all

CONFIG = "config.json"
Open = Callable[[str], Checkpoint]


@dataclass
class TeacherEnd:
    """One teacher of weight above 0; `model` loads it on first use, `free` gives its memory back."""

    checkpoint: Checkpoint
    kind: Kind
    share: float
    attentions: bool
    notes: list[str] = field(default_factory=list)
    loaded: nn.Module | None = None
    num_parameters: int | None = None
    architecture: str | None = None
    config: Any = None

    def model(self) -> nn.Module:
        """The model, in eval mode and without gradients."""
        if self.loaded is None:
            self.loaded, notes = load(self.checkpoint, self.kind, self.attentions)
            self.loaded.requires_grad_(False)
            self.notes += [note for note in notes if note not in self.notes]
            self.num_parameters = sum(one.numel() for one in self.loaded.parameters())
            self.architecture, self.config = type(self.loaded).__name__, self.loaded.config
        return self.loaded

    def ready(self) -> Teacher:
        """The loaded teacher with its share."""
        return Teacher(self.checkpoint.name, self.model(), self.share)

    def free(self) -> None:
        """Forget the model."""
        self.loaded = None
        gc.collect()


@dataclass
class StudentEnd:
    """The student in memory, in one line where it came from, and its checkpoint where it has one."""

    model: nn.Module
    said: str
    checkpoint: Checkpoint | None
    quantized: bool = False
    notes: list[str] = field(default_factory=list)


def find_teachers(source: Checkpoint, settings: DistillSettings, open: Open, attentions: bool) -> list[TeacherEnd]:
    """The teachers that have a weight, the first one first.

    Raises: LLMCompressError when they are of different kinds.
    """
    named = [(source, settings.weight), *((open(one.model), one.weight) for one in settings.teachers)]
    kind = kind_of(source)
    raise_all(
        [
            LLMCompressError(f"{one.name}: is for {kind_of(one)}, and the first teacher for {kind}; both must be alike")
            for one, _ in named[1:]
            if kind_of(one) != kind
        ]
    )
    parts = shares([weight for _, weight in named])
    return [TeacherEnd(one, kind, share, attentions) for (one, _), share in zip(named, parts, strict=True) if share > 0]


def is_config(student: str) -> bool:
    """Whether a `student` setting names a config and no checkpoint."""
    path = Path(student).expanduser()
    if path.is_dir():
        return (path / CONFIG).is_file() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin"))
    return path.name.endswith(".json")


def find_student(
    teacher: TeacherEnd, settings: DistillSettings, open: Open, rows: Rows, seed: int, attentions: bool
) -> StudentEnd:
    """The student, in memory.

    Raises: LLMCompressError when none is asked for, it is of another kind, or it cannot be made or loaded.
    """
    if settings.student is None:
        return _cut(teacher, settings, rows, attentions)
    if is_config(settings.student):
        path = Path(settings.student).expanduser()
        if not path.exists():
            raise LLMCompressError(f"student {settings.student}: no such file")
        torch.manual_seed(seed)
        found = from_config(path, teacher.kind, teacher.checkpoint.trust_remote_code)
        notes = _eager(found, "student", attentions)
        return StudentEnd(found, f"random weights (seed {seed}) of the config {path.name}", None, notes=notes)
    checkpoint = open(settings.student)
    if kind_of(checkpoint) != teacher.kind:
        raise LLMCompressError(
            f"student {settings.student}: is for {kind_of(checkpoint)}, its teacher for {teacher.kind}; "
            "both must be alike"
        )
    quantized = is_quantized(checkpoint)
    if quantized and not is_ours(checkpoint.folder):
        raise LLMCompressError(
            f"student {settings.student}: was not quantized by llmcompress, so its codes cannot be trained",
            "quantize the original with llmcompress first, or choose a student in full precision",
        )
    model, notes = load(checkpoint, teacher.kind, attentions)
    shown = checkpoint.hub_id or Path(checkpoint.name).name
    how = ", quantized and trained on its grid" if quantized else ""
    return StudentEnd(model, f"the checkpoint {shown}{how}", checkpoint, quantized, notes)


def tokens_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Token -> id of a checkpoint's tokenizer."""
    return dict(load_tokenizer(checkpoint).get_vocab())


def logits_width(model: nn.Module, kind: Kind) -> int:
    """Entries of a prediction: rows of the output embeddings, or classes; 0 for a model that predicts nothing."""
    config: Any = model.config
    if kind == "classification":
        return int(config.num_labels)
    if kind == "embedding":
        return 0
    head = model.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0]) if head is not None else int(config.vocab_size)


def _cut(teacher: TeacherEnd, settings: DistillSettings, rows: Rows, attentions: bool) -> StudentEnd:
    asked = (settings.keep, settings.keep_units, settings.keep_heads)
    if all(one is None for one in asked) and not settings.layers:
        raise LLMCompressError(
            "distill: no student: neither a checkpoint nor a part of the teacher",
            "pass --student S, --keep 0.5 or --student-layers 0,2,4",
        )
    picked = rows.train[: settings.importance_rows]
    batches = [_unpacked(rows, picked[at : at + 8]) for at in range(0, len(picked), 8)]
    found, said = student_from(
        dense(teacher.checkpoint, teacher.kind) or teacher.model(),
        keep=settings.keep,
        layers=settings.layers,
        keep_units=settings.keep_units,
        keep_heads=settings.keep_heads,
        batches=batches,
    )
    shown = teacher.checkpoint.hub_id or Path(teacher.checkpoint.name).name
    found.requires_grad_(True)
    return StudentEnd(found, f"cut from {shown}: {said}", None, notes=_eager(found, "student", attentions))


def _eager(model: nn.Module, name: str, attentions: bool) -> list[str]:
    from llmcompress.distill.loading import with_probabilities

    return with_probabilities(model, name) if attentions else []


def _unpacked(rows: Rows, picked: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A batch as forward arguments with a mask, for measuring contributions."""
    batch = {name: value for name, value in rows.batch(picked).items() if name not in ("labels", "row")}
    if "position_ids" in batch:  # packed rows are full but for their ends
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch
