"""The distill stage: a teacher in, a smaller or quantized student out, trained to do what the teacher does.

    teachers ─┬─> do they fit? (task, tokenizer, layers, widths) ─> predictions, online or cached ─┐
    student ──┘      before any training                                                          ├─> train ─> write ─>
    data ──────> rows: training | held out ───────────────────────────────────────────────────────┘    load again,
                                                                                                       measure, rename

The student is measured on held-out rows before it is trained, and after, from the files that were written. A run that
was killed goes on from the last whole checkpoint of the trainer, which lies beside the output and goes away with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.checkpoint.writer import give_name
from llmcompress.compress.assemble import describe_source
from llmcompress.console import Progress
from llmcompress.distill.objective import Distiller, Objective
from llmcompress.distill.on_policy import require_on_policy, train_on_policy
from llmcompress.distill.predictions import TeacherPredictions, teacher_predictions
from llmcompress.distill.quantized import OnGrid, put_on_grid
from llmcompress.distill.results import Figures, distillation, measure
from llmcompress.distill.rows import Rows, load_rows
from llmcompress.distill.settings import ATTENTION, HIDDEN, DistillSettings
from llmcompress.distill.student import Fit, Student, find_student, fit
from llmcompress.distill.teachers import Open, PredictionSource, Teacher, find_teachers, load
from llmcompress.distill.writing import grid_linears, stored_dtype, write_on_grid, write_plain
from llmcompress.distributed import num_processes, speaks
from llmcompress.errors import LLMCompressError
from llmcompress.memory import large_blocks_kept
from llmcompress.models import meta
from llmcompress.models.blocks import is_transposed
from llmcompress.models.loading import best_device
from llmcompress.models.tasks import Task, pooling_of
from llmcompress.models.vocabulary import need_rows, num_embeddings, tokenizer_place
from llmcompress.report import Check, GridTraining, OnPolicy, RunReport, Training
from llmcompress.seed import derive
from llmcompress.training.trainer import train

DEFAULT_LOSS = {"embedding": "sentence"}
"""Task -> what is matched where nothing is asked for; for all others forward_kl, or js on the student's own text (as
GKD does)."""
HUB_TASKS = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "classification": "text-classification",
    "embedding": "sentence-similarity",
}
"""Task -> what the Hub calls it."""


@dataclass
class _Job:
    """What the steps of one distillation share."""

    source: Checkpoint
    settings: DistillSettings
    teachers: list[Teacher]
    student: Student
    rows: Rows
    objective: Objective
    fit: Fit
    progress: Progress
    seed: int
    grids: dict[str, OnGrid] = field(default_factory=dict)

    def measure(self, model: nn.Module, predictions: TeacherPredictions, beside: nn.Module | None = None) -> Figures:
        """A student's figures on the held-out rows, and the speed of a model beside it."""
        return self._measure(model, predictions.heldout, beside)

    def measure_teacher(self) -> Figures | None:
        """The first teacher's figures, where it is in memory."""
        return None if self.teachers[0].loaded is None else self._measure(self.teachers[0].loaded, None, None)

    def _measure(self, model: nn.Module, source: PredictionSource | None, beside: nn.Module | None) -> Figures:
        size, heldout, device = self.settings.training.batch_size, self.rows.heldout, best_device()
        batches = (
            {name: value.to(device) for name, value in self.rows.batch(heldout[start : start + size]).items()}
            for start in range(0, len(heldout), size)
        )
        of = self.objective
        return measure(model, source, batches, of.task, of.vocabulary, of.pooling, beside)


@large_blocks_kept()
def distill(
    source: Checkpoint, out: Path, settings: DistillSettings, *, open: Open, seed: int, key: str, report: RunReport,
    progress: Progress,
) -> None:  # fmt: skip
    """Distill `source` and the further teachers into a student, written to `out` together with the report.

    `key` names this very work: checkpoints left by a killed run with the same key are continued.

    Raises: LLMCompressError for anything a user can mend; the output is then not there.
    """
    job = _prepare(source, settings, open, seed, progress)
    scratch = out.parent / f".{out.name}.distill-{key[:16]}"
    with _main_process_first():
        predictions = teacher_predictions(job.rows, job.teachers, settings, job.fit.vocabulary, job.objective, progress)
    before = job.measure(job.student.model, predictions)
    teacher = job.measure_teacher()
    trained = _train(job, predictions, scratch / "training")
    if speaks():
        _finish(job, report, predictions, trained, (teacher, before), scratch, out)
    with _main_process_first():  # no process goes on before the folder has its name
        pass


def _finish(
    job: _Job, report: RunReport, predictions: TeacherPredictions, trained: tuple[Training, OnPolicy | None],
    before: tuple[Figures | None, Figures], scratch: Path, out: Path,
) -> None:  # fmt: skip
    """Write, load again, measure, report, and give the folder its name. before: figures of teacher and student."""
    source, task = job.source, job.objective.task
    report.source = report.source or describe_source(source, meta.build(source, quantized=True, task=task))
    report.source.pipeline_tag = report.source.pipeline_tag or HUB_TASKS[task.name]
    final = scratch / "final"
    written, grid = _write(job, report, final)
    written.save(final)  # by which our own reader knows the codes
    reopened = Checkpoint.open(final)
    model, _ = load(reopened, task, attentions=False)
    after = job.measure(model, predictions, job.teachers[0].loaded)
    reopened.require_finite()
    detail = f"the files were loaded again, all weights finite, and gave the {after.num_items} held-out predictions"
    written.checks = [Check(name="loads", passed=True, detail=detail)]
    written.distillation = distillation(
        job.teachers, job.student, job.settings, job.objective, job.fit, predictions, job.rows, trained,
        (*before, after), grid,
    )  # fmt: skip
    written.save(final)
    give_name(final, out)
    shutil.rmtree(scratch, ignore_errors=True)


def _main_process_first() -> AbstractContextManager[object]:
    """One process before the others, so that a cache is filled once."""
    if num_processes() == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=best_device().type == "cpu").main_process_first()  # type: ignore[no-any-return]


def _prepare(source: Checkpoint, settings: DistillSettings, open: Open, seed: int, progress: Progress) -> _Job:
    attentions = any(settings.losses.get(name, 0) > 0 for name in ATTENTION)  # type: ignore[call-overload]
    teachers = find_teachers(source, settings, open, attentions)
    task = teachers[0].task
    weights = {str(name): weight for name, weight in settings.losses.items() if weight > 0}
    weights = weights or {DEFAULT_LOSS.get(task.name, "js" if settings.on_policy else "forward_kl"): 1.0}
    _require_losses(task, weights, settings)
    require_on_policy(settings, task)
    tokenizer = load_tokenizer(source)
    rows = load_rows(settings.data, tokenizer, task, settings.masked_frac, seed)
    student = find_student(teachers[0], settings, open, rows, derive(seed, "student"), attentions)
    ids = (token for row in (*rows.train, *rows.heldout) for token in row.ids)
    need_rows(ids, num_embeddings(student.model), tokenizer, tokenizer_place(source.folder))
    intermediates = any(name in weights for name in (*HIDDEN, *ATTENTION, "sentence"))
    fitted = fit(teachers, student, settings, weights, intermediates)
    objective = Objective(
        task=task,
        weights=weights,
        temperature=settings.temperature,
        beta=settings.beta,
        maps=fitted.maps,
        vocabulary=fitted.vocabulary.size,
        pooling=pooling_of(source.folder) if task.name == "embedding" else "mean",
        phase_frac=settings.phase_frac,
    )
    for note in [*fitted.notes, *(note for teacher in teachers for note in teacher.notes), *student.notes]:
        progress.message(note)
    return _Job(source, settings, teachers, student, rows, objective, fitted, progress, seed)


def _require_losses(task: Task, weights: Mapping[str, float], settings: DistillSettings) -> None:
    """Raises: LLMCompressError for losses of predictions that the task does not make."""
    if task.name == "embedding":
        wrong, why = set(weights) & {"forward_kl", "reverse_kl", "js", "ce"}, "a sentence encoder predicts nothing"
    else:
        wrong, why = set(weights) & {"sentence"}, f"a {task.name} model gives no sentence vector"
    if wrong:
        raise LLMCompressError(f"losses: {', '.join(sorted(wrong))}: {why}")
    if task.name == "embedding" and settings.cache is not None:
        raise LLMCompressError(
            "cache: holds predictions, and a sentence encoder predicts nothing", "leave out the cache"
        )


def _train(job: _Job, predictions: TeacherPredictions, folder: Path) -> tuple[Training, OnPolicy | None]:
    student = job.student.model
    if job.student.quantized:
        _put_on_grid(job)
    for name, parameter in student.named_parameters():
        if "pooler" in name:  # made anew, not used, and without a gradient
            parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(derive(job.seed, "projections"))
        distiller = Distiller(student, predictions.train, job.objective, job.fit.widths).to(best_device())
    job.fit.projection_parameters = sum(parameter.numel() for parameter in distiller.projections.parameters())
    if job.settings.on_policy is not None:
        tokenizer = load_tokenizer(job.source)
        return train_on_policy(distiller, job.rows, job.settings, tokenizer, folder, job.seed, job.progress)
    training = train(
        distiller,
        job.rows.train,  # type: ignore[arg-type]
        job.settings.training,
        folder,
        padding=job.rows.padding,
        seq_len=job.settings.data.seq_len,
        seed=job.seed,
        progress=job.progress,
        driver=_Phases(distiller),
        batch=job.rows.batch,
    )
    return training, None


@dataclass
class _Phases:
    """Tells the objective how far training is; a run that is continued is as far as it was."""

    distiller: Distiller
    total: int = 1

    def start(self, total_steps: int) -> None:
        """See `llmcompress.training.trainer.Driver`."""
        self.total = max(1, total_steps)

    def step(self, step: int) -> None:
        """See `llmcompress.training.trainer.Driver`."""
        self.distiller.progress = (step + 1) / self.total

    def state(self) -> dict[str, Any]:
        """See `llmcompress.training.trainer.Driver`."""
        return {"progress": self.distiller.progress}

    def restore(self, state: dict[str, Any]) -> None:
        """See `llmcompress.training.trainer.Driver`."""
        self.distiller.progress = float(state["progress"])


def _put_on_grid(job: _Job) -> None:
    assert job.student.checkpoint is not None
    student, original = job.student.model, dict(job.teachers[0].model().named_parameters())
    student.requires_grad_(False)
    generator = torch.Generator().manual_seed(derive(job.seed, "adapters"))
    for name, quantized in grid_linears(student, job.student.checkpoint).items():
        linear = student.get_submodule(name)
        known = original.get(f"{name}.weight")
        known_OI = known.t() if known is not None and is_transposed(linear) else known
        job.grids[name] = put_on_grid(linear, quantized, known_OI, job.settings.adapter.rank, generator)


def _write(job: _Job, report: RunReport, folder: Path) -> tuple[RunReport, GridTraining | None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if job.grids:
        assert job.student.checkpoint is not None
        quantized, changed = write_on_grid(job.student.model, job.grids, job.student.checkpoint, folder)
        kept = {"linears": quantized.linears, "output": quantized.output, "calibration": quantized.calibration}
        return report.model_copy(update=kept), GridTraining(
            rank=job.settings.adapter.rank, num_linears=len(job.grids), changed_codes_frac=changed
        )
    like = job.student.checkpoint or job.source
    report.output = write_plain(job.student.model, folder, stored_dtype(like), job.source.folder)
    return report, None
