"""Fill a cache of predictions from the teachers, with as many of them in memory as there is room for.

    all at once      batch ──> teacher 1, teacher 2 ──> mixture ──> K tokens ──> disk
    one at a time    for a chunk of rows: load teacher 1, add its part for every row, free it; teacher 2 likewise; then
                     the mixture of the chunk is folded and written

Both give the same numbers. A chunk's whole distributions [rows, S, V] take CHUNK_BYTES at most.

Shapes: N rows, B rows of a batch, S tokens, V vocabulary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llmcompress.console import Progress
from llmcompress.distill import cache, topk
from llmcompress.distill.kinds import Kind
from llmcompress.distill.mixture import Combine, Mixture
from llmcompress.distill.models import TeacherEnd
from llmcompress.distill.objective import NOT_INPUTS, labels_in_step
from llmcompress.distill.rows import Row, Rows
from llmcompress.distill.teachers import predictions, run

CHUNK_BYTES = 1 << 30


def asked_of(
    rows: Rows, picked: Sequence[Row], teachers: Sequence[TeacherEnd], digest: str, num_kept: int, vocabulary: int,
    temperature: float, combine: Combine, part: cache.PartName,
) -> cache.Asked:  # fmt: skip
    """The entry that holds the teachers' predictions on `picked` rows, whose digest is `digest`."""
    known = tuple(
        cache.CachedTeacher(name=one.checkpoint.name, identity=one.checkpoint.identity(), share=one.share)
        for one in teachers
    )
    return cache.Asked(
        teachers=known,
        data=digest,
        num_rows=len(picked),
        row_tokens=1 if rows.kind == "classification" else max(len(row.ids) for row in picked),
        num_kept=min(num_kept, vocabulary),
        vocabulary=vocabulary,
        temperature=temperature,
        combine=combine if len(known) > 1 else "probabilities",
        part=part,
    )


def fill(
    root: Path, asked: cache.Asked, rows: Rows, picked: Sequence[Row], teachers: Sequence[TeacherEnd],
    batch_size: int, one_at_a_time: bool, progress: Progress,
) -> cache.TeacherCache:  # fmt: skip
    """Run the teachers over `picked` rows and write the entry."""
    row_bytes = 4 * asked.row_tokens * asked.vocabulary
    alone = one_at_a_time and len(teachers) > 1
    at_once = max(batch_size, CHUNK_BYTES // row_bytes) if alone else batch_size
    with progress.step("teachers' predictions", len(picked)) as bar:

        def answers(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            mixture = Mixture(asked.combine, asked.temperature)  # type: ignore[arg-type]
            for teacher in teachers:
                mixture.add(_logits(teacher, rows, picked[start:stop], asked, batch_size), teacher.share)
                if alone:
                    teacher.free()
            bar.advance(stop - start)
            return topk.fold(mixture.log_probs(), asked.num_kept)

        counts_NS = torch.zeros(asked.num_rows, asked.row_tokens, dtype=torch.bool)
        for index, row in enumerate(picked):
            one = labels_in_step(rows.kind, rows.batch([row]))[0]
            counts_NS[index, : one.shape[1]] = one[0]
        return cache.write(root, asked, counts_NS, answers, at_once)


def _logits(
    teacher: TeacherEnd, rows: Rows, picked: Sequence[Row], asked: cache.Asked, batch_size: int
) -> torch.Tensor:
    """float32 [B, S, V] of some rows, on the CPU, filled up with zeros to the longest row of the entry."""
    found = torch.zeros(len(picked), asked.row_tokens, asked.vocabulary)
    model = teacher.model()
    with torch.inference_mode():
        for start in range(0, len(picked), batch_size):
            batch = rows.batch(picked[start : start + batch_size])
            inputs = {name: value.to(_device(model)) for name, value in batch.items() if name not in NOT_INPUTS}
            kind: Kind = rows.kind
            logits_BSV = predictions(run(model, inputs, kind, False, False), kind)[..., : asked.vocabulary]
            found[start : start + len(logits_BSV), : logits_BSV.shape[1]] = logits_BSV.float().cpu()
    return found


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
