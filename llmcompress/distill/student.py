"""The student before it is trained: where it comes from, and whether it fits its teachers.

    a checkpoint │ a config, random weights │ cut from the first teacher │ quantized, trained on its grid

What does not fit is found before anything is trained, and told all at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.distill.cut import student_from
from llmcompress.distill.layer_map import Pairs, layer_map
from llmcompress.distill.rows import Rows
from llmcompress.distill.settings import ATTENTION, HIDDEN, DistillSettings
from llmcompress.distill.teachers import Open, Teacher, is_ours, is_quantized, load, load_dense, switch_to_eager
from llmcompress.errors import LLMCompressError, collected, raise_all
from llmcompress.models.loading import random_model
from llmcompress.models.tasks import task_of
from llmcompress.models.vocabulary import SharedVocabulary, VocabularySide, shared_vocabulary

CONFIG = "config.json"
MAPPED = ("hidden_mse", "hidden_cosine", *ATTENTION)
"""Losses that go by a layer map."""
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "word_embeddings.weight", "wte.weight")


@dataclass
class Student:
    """The student in memory; `origin`: in one line where it came from; its checkpoint where it has one."""

    model: nn.Module
    origin: str
    checkpoint: Checkpoint | None
    quantized: bool = False
    notes: list[str] = field(default_factory=list)


def is_config(student: str) -> bool:
    """Whether a `student` setting names a config and no checkpoint."""
    path = Path(student).expanduser()
    if path.is_dir():
        return (path / CONFIG).is_file() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin"))
    return path.name.endswith(".json")


def find_student(
    teacher: Teacher, settings: DistillSettings, open: Open, rows: Rows, seed: int, attentions: bool
) -> Student:
    """The student, in memory.

    Raises: LLMCompressError when none is asked for, it is for another task, or it cannot be made or loaded.
    """
    if settings.student is None:
        return _cut_from(teacher, settings, rows, attentions)
    if is_config(settings.student):
        path = Path(settings.student).expanduser()
        if not path.exists():
            raise LLMCompressError(f"student {settings.student}: no such file")
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            model = random_model(path, teacher.task, teacher.checkpoint.trust_remote_code)
        notes = switch_to_eager(model, "student") if attentions else []
        return Student(model, f"random weights (seed {seed}) of the config {path.name}", None, notes=notes)
    checkpoint = open(settings.student)
    if task_of(checkpoint) is not teacher.task:
        raise LLMCompressError(
            f"student {settings.student}: is for {task_of(checkpoint).name}, its teacher for {teacher.task.name}; "
            "both must be alike"
        )
    quantized = is_quantized(checkpoint)
    if quantized and not is_ours(checkpoint.folder):
        raise LLMCompressError(
            f"student {settings.student}: was not quantized by llmcompress, so its codes cannot be trained",
            "quantize the original with llmcompress first, or choose a student in full precision",
        )
    model, notes = load(checkpoint, teacher.task, attentions)
    shown = checkpoint.hub_id or Path(checkpoint.name).name
    how = ", quantized and trained on its grid" if quantized else ""
    return Student(model, f"the checkpoint {shown}{how}", checkpoint, quantized, notes)


def _cut_from(teacher: Teacher, settings: DistillSettings, rows: Rows, attentions: bool) -> Student:
    asked = (settings.keep, settings.keep_units, settings.keep_heads)
    if all(share is None for share in asked) and not settings.layers:
        raise LLMCompressError(
            "distill: no student: neither a checkpoint nor a part of the teacher",
            "pass --student S, --keep 0.5 or --student-layers 0,2,4",
        )
    picked = rows.train[: settings.importance_rows]
    batches = [_unpacked(rows, picked[at : at + 8]) for at in range(0, len(picked), 8)]
    model, kept = student_from(
        load_dense(teacher.checkpoint, teacher.task) or teacher.model(),
        keep=settings.keep,
        layers=settings.layers,
        keep_units=settings.keep_units,
        keep_heads=settings.keep_heads,
        batches=batches,
    )
    shown = teacher.checkpoint.hub_id or Path(teacher.checkpoint.name).name
    model.requires_grad_(True)
    notes = switch_to_eager(model, "student") if attentions else []
    return Student(model, f"cut from {shown}: {kept}", None, notes=notes)


def _unpacked(rows: Rows, picked: Sequence[Any]) -> dict[str, torch.Tensor]:
    """A batch as forward arguments with a mask, for measuring contributions."""
    batch = {name: value for name, value in rows.batch(picked).items() if name not in ("labels", "row")}
    if "position_ids" in batch:  # packed rows are full but for their ends
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


@dataclass
class Fit:
    """What the objective needs to know of all models. widths: hidden sizes (student, teacher), one per teacher."""

    vocabulary: SharedVocabulary
    maps: list[Pairs]
    widths: list[tuple[int, int]]
    notes: list[str] = field(default_factory=list)
    projection_parameters: int = 0


def fit(
    teachers: Sequence[Teacher], student: Student, settings: DistillSettings, weights: Mapping[str, float],
    intermediates: bool,
) -> Fit:  # fmt: skip
    """Hold every teacher against the student. intermediates: hidden states or attention are matched, so that teachers
    are loaded.

    Raises: LLMCompressError, one for each thing that does not fit.
    """
    problems: list[LLMCompressError] = []
    tokens = _tokens(student.checkpoint or teachers[0].checkpoint)
    fitted = Fit(SharedVocabulary(0, None), [], [])
    for teacher in teachers:
        with collected(problems):
            vocabulary = _vocabulary(teacher, student, tokens)
            if not fitted.vocabulary.size or vocabulary.size < fitted.vocabulary.size:
                fitted.vocabulary = vocabulary
            fitted.notes += [vocabulary.note] if vocabulary.note else []
        if intermediates:
            _fit_intermediates(teacher, student.model, settings, weights, fitted, problems)
    raise_all(problems)
    return fitted


def _tokens(checkpoint: Checkpoint) -> dict[str, int]:
    """Token -> id of a checkpoint's tokenizer."""
    return dict(load_tokenizer(checkpoint).get_vocab())


def _vocabulary(teacher: Teacher, student: Student, tokens: Mapping[str, int]) -> SharedVocabulary:
    names = teacher.checkpoint.name, student.checkpoint.name if student.checkpoint else "(the student)"
    teacher_size, student_size = _num_predicted(teacher), teacher.task.num_predicted(student.model)
    teacher_tokens = _tokens(teacher.checkpoint)
    if teacher.task.metric == "perplexity":
        sizes = teacher_size, student_size
    else:  # encoders of texts share ids, not rows of logits
        sizes = (max([*teacher_tokens.values(), *tokens.values()], default=0) + 1,) * 2
    shared = shared_vocabulary(
        VocabularySide(f"teacher {names[0]}", teacher_tokens, sizes[0]),
        VocabularySide(f"student {names[1]}", tokens, sizes[1]),
    )
    if teacher.task.metric == "perplexity":
        return shared
    if teacher_size != student_size:
        raise LLMCompressError(
            f"teacher {names[0]} tells {teacher_size} classes apart and student {names[1]} {student_size}; both need "
            "the same"
        )
    return SharedVocabulary(student_size, None)


def _num_predicted(teacher: Teacher) -> int:
    """Entries of the teacher's predictions, off its files: it need not be loaded for that."""
    config: Mapping[str, Any] = teacher.checkpoint.config
    if teacher.task.name == "embedding":
        return 0
    if teacher.task.name == "classification":
        return len(config.get("id2label") or {}) or int(config.get("num_labels", 2))
    if teacher.loaded is not None:
        return teacher.task.num_predicted(teacher.loaded)
    rows = [tensor.shape[0] for name, tensor in teacher.checkpoint.stored.items() if name.endswith(EMBEDDINGS)]
    return min(rows) if rows else int(config["vocab_size"])


def _fit_intermediates(
    teacher: Teacher, student: nn.Module, settings: DistillSettings, weights: Mapping[str, float], fitted: Fit,
    problems: list[LLMCompressError],
) -> None:  # fmt: skip
    mine: Any = student.config
    theirs: Any = teacher.model().config
    widths = int(mine.hidden_size), int(theirs.hidden_size)
    fitted.widths.append(widths)
    if any(weights.get(name, 0) > 0 for name in (*HIDDEN, "sentence")) and widths[0] != widths[1]:
        if settings.projection == "none":
            text = f"hidden sizes differ, {widths[0]} of the student and {widths[1]} of {teacher.checkpoint.name}"
            hint = "use projection: learned, or leave out the losses of hidden states"
            problems.append(LLMCompressError(f"{text}, and projection is none", hint))
        fitted.notes.append(
            f"hidden sizes differ ({widths[0]} and {widths[1]}): compared through a learned projection, which is no "
            "part of the student"
        )
    asked = [name for name in MAPPED if weights.get(name, 0) > 0]
    if not asked:
        fitted.maps.append(())
        return
    with collected(problems):
        layers = int(mine.num_hidden_layers), int(theirs.num_hidden_layers)
        fitted.maps.append(layer_map(settings.layer_map, *layers))
    heads = int(mine.num_attention_heads), int(theirs.num_attention_heads)
    if heads[0] != heads[1] and any(name in ATTENTION for name in asked):
        fitted.notes.append(f"heads differ in number ({heads[0]} and {heads[1]}): attention is compared as their mean")
