"""Where the teachers' predictions come from in one run: the models themselves, or a cache, filled where it is not.

    no cache         Online teachers, in memory all through
    cache            an entry for the training rows at the training's temperature, and one for the held-out rows at
                     temperature 1; the teachers are loaded only if an entry is missing

Filled with as many teachers in memory as there is room for; both ways give the same numbers:

    all at once      batch ──> teacher 1, teacher 2 ──> mixture ──> K tokens ──> disk
    one at a time    for a chunk of rows: load teacher 1, add its part for every row, free it; teacher 2 likewise; then
                     the mixture of the chunk is folded and written. A chunk takes CHUNK_BYTES at most

Shapes: N rows, B rows of a batch, S tokens, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmcompress.console import Progress
from llmcompress.distill import cache
from llmcompress.distill.losses import Mixture, fold
from llmcompress.distill.objective import NOT_INPUTS, Objective
from llmcompress.distill.rows import Row, Rows
from llmcompress.distill.settings import ATTENTION, HIDDEN, DistillSettings
from llmcompress.distill.teachers import Cached, Online, PredictionSource, Teacher
from llmcompress.models.loading import best_device
from llmcompress.models.vocabulary import SharedVocabulary
from llmcompress.report import CachedPredictions

CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class TeacherPredictions:
    """Predictions for training rows and for held-out ones (None where there are none), and what the report says of
    their cache."""

    train: PredictionSource
    heldout: PredictionSource | None
    cached: CachedPredictions | None = None


def teacher_predictions(
    rows: Rows, teachers: Sequence[Teacher], settings: DistillSettings, vocabulary: SharedVocabulary,
    objective: Objective, progress: Progress,
) -> TeacherPredictions:  # fmt: skip
    """See the module's docstring."""
    if settings.cache is None:
        return _online(teachers, settings, vocabulary, objective)
    root = Path(settings.cache).expanduser()
    train, reused = _entry(root, rows, "training", teachers, settings, vocabulary.size, settings.temperature, progress)
    heldout = None
    if rows.heldout:
        heldout, _ = _entry(root, rows, "held-out", teachers, settings, vocabulary.size, 1.0, progress)
    for teacher in teachers:
        teacher.free()
    manifest, device = train.manifest, best_device()
    report = CachedPredictions(
        key=manifest.asked.key(),
        top_k=manifest.asked.num_kept,
        mean_tail_mass=manifest.mean_rest,
        max_tail_mass=manifest.largest_rest,
        reused=reused,
    )
    return TeacherPredictions(Cached(train, device), Cached(heldout, device) if heldout else None, report)


def _online(
    teachers: Sequence[Teacher], settings: DistillSettings, vocabulary: SharedVocabulary, objective: Objective
) -> TeacherPredictions:
    task, size, combine = objective.task, vocabulary.size, settings.combine
    models = [(teacher.model(), teacher.share) for teacher in teachers]
    hidden, attentions = objective.needs((*HIDDEN, "sentence")), objective.needs(ATTENTION)
    return TeacherPredictions(
        Online(models, task, size, combine, settings.temperature, hidden, attentions),
        Online(models, task, size, combine, 1.0, task.name == "embedding", False),
    )


def _entry(
    root: Path, rows: Rows, part: cache.PartName, teachers: Sequence[Teacher], settings: DistillSettings,
    vocabulary: int, temperature: float, progress: Progress,
) -> tuple[cache.TeacherCache, bool]:  # fmt: skip
    """An entry and whether it was there already."""
    picked = rows.train if part == "training" else rows.heldout
    request = cache.CacheRequest(
        teachers=tuple(
            cache.CachedTeacher(
                name=teacher.checkpoint.name, identity=teacher.checkpoint.identity(), share=teacher.share
            )
            for teacher in teachers
        ),
        data=rows.digest(picked),
        num_rows=len(picked),
        row_tokens=1 if rows.task.name == "classification" else max(len(row.ids) for row in picked),
        num_kept=min(settings.cache_tokens, vocabulary),
        vocabulary=vocabulary,
        temperature=temperature,
        combine=settings.combine if len(teachers) > 1 else "probabilities",
        part=part,
    )
    if settings.refill_cache:
        for name in cache.clear(root, request):
            progress.message(f"{root}: {name} was filled for something else, and is filled again")
    cache.check(root, request)
    entry = cache.find(root, request)
    if entry is not None:
        progress.message(f"predictions on the {part} rows: cached before, the teacher is not run")
        return entry, True
    return _fill(root, request, rows, picked, teachers, settings, progress), False


def _fill(
    root: Path, request: cache.CacheRequest, rows: Rows, picked: Sequence[Row], teachers: Sequence[Teacher],
    settings: DistillSettings, progress: Progress,
) -> cache.TeacherCache:  # fmt: skip
    """Run the teachers over `picked` rows and write the entry."""
    batch_size = settings.training.batch_size
    alone = settings.one_at_a_time and len(teachers) > 1
    row_bytes = 4 * request.row_tokens * request.vocabulary
    at_once = max(batch_size, CHUNK_BYTES // row_bytes) if alone else batch_size
    with progress.step("teachers' predictions", len(picked)) as bar:

        def predict(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            mixture = Mixture(settings.combine if len(teachers) > 1 else "probabilities", request.temperature)
            for teacher in teachers:
                mixture.add(_logits(teacher, rows, picked[start:stop], request, batch_size), teacher.share)
                if alone:
                    teacher.free()
            bar.advance(stop - start)
            return fold(mixture.log_probs(), request.num_kept)

        counts_NS = torch.zeros(request.num_rows, request.row_tokens, dtype=torch.bool)
        for index, row in enumerate(picked):
            counts_1S, _ = rows.task.targets(rows.batch([row]))
            counts_NS[index, : counts_1S.shape[1]] = counts_1S[0]
        return cache.write(root, request, counts_NS, predict, at_once)


def _logits(
    teacher: Teacher, rows: Rows, picked: Sequence[Row], request: cache.CacheRequest, batch_size: int
) -> torch.Tensor:
    """float32 [B, S, V] of some rows, on the CPU, filled up with zeros to the longest row of the entry."""
    filled_BSV = torch.zeros(len(picked), request.row_tokens, request.vocabulary)
    model = teacher.model()
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(picked), batch_size):
            batch = rows.batch(picked[start : start + batch_size])
            inputs = {name: value.to(device) for name, value in batch.items() if name not in NOT_INPUTS}
            logits_BSV = rows.task.predictions(rows.task.run(model, inputs))
            assert logits_BSV is not None, "a cache is refused for a model that predicts nothing"
            logits_BSV = logits_BSV[..., : request.vocabulary]
            filled_BSV[start : start + len(logits_BSV), : logits_BSV.shape[1]] = logits_BSV.float().cpu()
    return filled_BSV
