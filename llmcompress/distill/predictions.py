"""Where the teachers' answers come from in one run: the models themselves, or entries of a cache, filled when missing.

no cache    Online teachers, in memory all through
cache       an entry for the training rows at the training's temperature, and one for the held-out rows at
            temperature 1; the teachers are loaded only if an entry is missing
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcompress.console import Progress
from llmcompress.distill import cache
from llmcompress.distill.caching import asked_of, fill
from llmcompress.distill.heldout import Figures
from llmcompress.distill.models import TeacherEnd
from llmcompress.distill.objective import ATTENTION, HIDDEN, Objective
from llmcompress.distill.rows import Row, Rows
from llmcompress.distill.settings import DistillSettings
from llmcompress.distill.teachers import Cached, Online, Source
from llmcompress.distill.vocabulary import SharedVocabulary
from llmcompress.models import device as devices
from llmcompress.report import CachedPredictions


@dataclass(frozen=True)
class Answers:
    """Answers for training rows and for held-out ones (None where there are none), and what the report says of them."""

    train: Source | None
    heldout: Source | None
    cached: CachedPredictions | None = None
    teacher_figures: Figures | None = None


def answers_for(
    rows: Rows, teachers: Sequence[TeacherEnd], settings: DistillSettings, vocabulary: SharedVocabulary,
    objective: Objective, progress: Progress,
) -> Answers:  # fmt: skip
    """See the module's docstring."""
    if settings.cache is None:
        return _online(teachers, settings, vocabulary, objective)
    root = Path(settings.cache).expanduser()
    size, heat = vocabulary.size, settings.temperature
    train, reused = _entry(root, rows, rows.train, "training", teachers, settings, size, heat, progress)
    heldout = None
    if rows.heldout:
        heldout, _ = _entry(root, rows, rows.heldout, "held-out", teachers, settings, size, 1.0, progress)
    for teacher in teachers:
        teacher.free()
    gc.collect()
    manifest = train.manifest
    said = CachedPredictions(
        key=manifest.asked.key(),
        num_kept=manifest.asked.num_kept,
        mean_rest=manifest.mean_rest,
        largest_rest=manifest.largest_rest,
        reused=reused,
    )
    device = devices.best()
    return Answers(Cached(train, device), Cached(heldout, device) if heldout else None, said)


def _online(
    teachers: Sequence[TeacherEnd], settings: DistillSettings, vocabulary: SharedVocabulary, objective: Objective
) -> Answers:
    hidden = objective.needs((*HIDDEN, "sentence"))
    attentions = objective.needs(ATTENTION)
    ready = [one.ready() for one in teachers]

    def online(temperature: float, hidden: bool, attentions: bool) -> Source:
        return Online(ready, objective.kind, vocabulary.size, settings.combine, temperature, hidden, attentions)

    return Answers(online(settings.temperature, hidden, attentions), online(1.0, objective.kind == "embedding", False))


def _entry(
    root: Path, rows: Rows, picked: Sequence[Row], part: cache.PartName, teachers: Sequence[TeacherEnd],
    settings: DistillSettings, vocabulary: int, temperature: float, progress: Progress,
) -> tuple[cache.TeacherCache, bool]:  # fmt: skip
    """An entry and whether it was there already."""
    asked = asked_of(
        rows, picked, teachers, rows.digest(picked), settings.cache_tokens, vocabulary, temperature,
        settings.combine, part,
    )  # fmt: skip
    if settings.refill_cache:
        for name in cache.clear(root, asked):
            progress.message(f"{root}: {name} was filled for something else, and is filled again")
    cache.check(root, asked)
    found = cache.find(root, asked)
    if found is not None:
        progress.message(f"predictions on the {part} rows: cached before, the teacher is not run")
        return found, True
    at_once = settings.training.batch_size
    return fill(root, asked, rows, picked, teachers, at_once, settings.one_at_a_time, progress), False
