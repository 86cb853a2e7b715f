"""Whether teachers and student fit together, found before anything is trained and said all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from llmcompress.distill.kinds import Kind
from llmcompress.distill.layer_map import Pairs, layer_map
from llmcompress.distill.models import StudentEnd, TeacherEnd, logits_width, tokens_of
from llmcompress.distill.objective import ATTENTION, HIDDEN
from llmcompress.distill.settings import DistillSettings
from llmcompress.distill.vocabulary import SharedVocabulary, shared_vocabulary
from llmcompress.errors import LLMCompressError, ProblemsError, raise_all

MAPPED = ("hidden_mse", "hidden_cosine", *ATTENTION)
"""Losses that go by a layer map."""
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "word_embeddings.weight", "wte.weight")


@dataclass
class Fit:
    """What the objective needs to know of both ends. widths: hidden sizes (student, teacher), one per teacher."""

    vocabulary: SharedVocabulary
    maps: list[Pairs]
    widths: list[tuple[int, int]]
    notes: list[str] = field(default_factory=list)
    projection_parameters: int = 0


def fit(
    teachers: Sequence[TeacherEnd], student: StudentEnd, settings: DistillSettings, kind: Kind,
    weights: Mapping[str, float], load_insides: bool,
) -> Fit:  # fmt: skip
    """Hold every teacher against the student. load_insides: teachers' insides are matched, so they must be at hand.

    Raises: LLMCompressError, one for each thing that does not fit.
    """
    problems: list[LLMCompressError] = []
    tokens = tokens_of(student.checkpoint) if student.checkpoint else tokens_of(teachers[0].checkpoint)
    fitted = Fit(SharedVocabulary(0, None), [], [])
    for teacher in teachers:
        vocabulary = _tried(partial(_vocabulary, teacher, student, tokens, kind), problems)
        if vocabulary is not None:
            smaller = not fitted.vocabulary.size or vocabulary.size < fitted.vocabulary.size
            fitted.vocabulary = vocabulary if smaller else fitted.vocabulary
            fitted.notes += [vocabulary.note] if vocabulary.note else []
        if load_insides:
            _insides(teacher, student.model, settings, weights, fitted, problems)
    raise_all(problems)
    return fitted


def _vocabulary(teacher: TeacherEnd, student: StudentEnd, tokens: Mapping[str, int], kind: Kind) -> SharedVocabulary:
    names = teacher.checkpoint.name, student.checkpoint.name if student.checkpoint else "(the student)"
    width, mine = _width(teacher, kind), logits_width(student.model, kind)
    own = tokens_of(teacher.checkpoint)
    if kind in ("causal", "masked"):
        return shared_vocabulary(names[0], own, width, names[1], tokens, mine)
    least = max([*own.values(), *tokens.values()], default=0) + 1  # encoders of texts share ids, not rows of logits
    shared_vocabulary(names[0], own, least, names[1], tokens, least)
    if width != mine:
        raise LLMCompressError(
            f"teacher {names[0]} tells {width} classes apart and student {names[1]} {mine}; both need the same"
        )
    return SharedVocabulary(mine, None)


def _width(teacher: TeacherEnd, kind: Kind) -> int:
    """Entries of the teacher's predictions, off its files: it need not be loaded for that."""
    config: Mapping[str, Any] = teacher.checkpoint.config
    if kind == "embedding":
        return 0
    if kind == "classification":
        return len(config.get("id2label") or {}) or int(config.get("num_labels", 2))
    if teacher.loaded is not None:
        return logits_width(teacher.loaded, kind)
    stored = teacher.checkpoint.stored
    rows = [one.shape[0] for name, one in stored.items() if name.endswith(EMBEDDINGS)]
    return min(rows) if rows else int(config["vocab_size"])


def _insides(
    teacher: TeacherEnd, student: nn.Module, settings: DistillSettings, weights: Mapping[str, float], fitted: Fit,
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
    pairs = _tried(
        lambda: layer_map(settings.layer_map, int(mine.num_hidden_layers), int(theirs.num_hidden_layers)), problems
    )
    fitted.maps.append(pairs or ())
    heads = int(mine.num_attention_heads), int(theirs.num_attention_heads)
    if heads[0] != heads[1] and any(name in ATTENTION for name in asked):
        fitted.notes.append(f"heads differ in number ({heads[0]} and {heads[1]}): attention is compared as their mean")


def _tried(action: Callable[[], Any], problems: list[LLMCompressError]) -> Any:
    try:
        return action()
    except ProblemsError as error:
        problems.extend(error.problems)
    except LLMCompressError as error:
        problems.append(error)
    return None
