"""The distill stage: a teacher in, a smaller or quantized student out, trained to do what the teacher does.

    teachers ─┬─> do they fit? (kind, tokenizer, layers, widths) ─> answers: online or cached ─┐
    student ──┘      before any training                                                      ├─> train ─> write ─> load
    data ──────> rows: training | held out ───────────────────────────────────────────────────┘       again, measure,
                                                                                                        rename

The student is measured on held-out rows before it is trained, and after, from the files that were written. A run that
was killed goes on from the last whole checkpoint of the trainer, which lies beside the output and goes away with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
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
from llmcompress.distill.fitting import Fit, fit
from llmcompress.distill.heldout import Figures, measure
from llmcompress.distill.kinds import Kind, pooling_of
from llmcompress.distill.loading import load, skeleton_of
from llmcompress.distill.models import Open, StudentEnd, TeacherEnd, find_student, find_teachers
from llmcompress.distill.objective import ATTENTION, HIDDEN, Distiller, Objective
from llmcompress.distill.on_grid import OnGrid, put_on_grid
from llmcompress.distill.on_policy import refuse, train_on_policy
from llmcompress.distill.predictions import Answers, answers_for
from llmcompress.distill.results import distillation
from llmcompress.distill.rows import Rows, load_rows
from llmcompress.distill.settings import DistillSettings
from llmcompress.distill.writing import grid_linears, stored_dtype, write_on_grid, write_plain
from llmcompress.errors import LLMCompressError
from llmcompress.memory import large_blocks_kept
from llmcompress.models import device as devices
from llmcompress.models.blocks import is_transposed
from llmcompress.report import Check, RunReport, Training
from llmcompress.report.training import GridTraining, OnPolicy
from llmcompress.seed import derive
from llmcompress.training.trainer import is_main, train, world_size

DEFAULT_LOSS: dict[Kind, str] = {"embedding": "sentence"}
"""What is matched where nothing is said; js on the student's own text (as GKD does), forward_kl for all others."""


TASKS: dict[Kind, str] = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "classification": "text-classification",
    "embedding": "sentence-similarity",
}
"""What the Hub calls it."""


@dataclass
class _Job:
    """What the steps of one distillation share."""

    source: Checkpoint
    settings: DistillSettings
    teachers: list[TeacherEnd]
    student: StudentEnd
    rows: Rows
    objective: Objective
    fit: Fit
    progress: Progress
    seed: int
    grids: dict[str, OnGrid] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return self.rows.kind


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
    with _first():
        answers = answers_for(job.rows, job.teachers, settings, job.fit.vocabulary, job.objective, progress)
    before = _measured(job, job.student.model, answers)
    teacher = _teacher_figures(job, answers)
    training, own_text = _train(job, answers, scratch / "training")
    if is_main():
        _finish(job, report, answers, (training, own_text), (teacher, before), scratch, out)
    _meet()


def _finish(
    job: _Job, report: RunReport, answers: Answers, trained: tuple[Training, OnPolicy | None],
    before: tuple[Figures | None, Figures], scratch: Path, out: Path,
) -> None:  # fmt: skip
    """Write, load again, measure, report, and give the folder its name. before: figures of teacher and student."""
    source = job.source
    report.source = report.source or describe_source(source, skeleton_of(source, job.kind))
    report.source.pipeline_tag = report.source.pipeline_tag or TASKS[job.kind]
    made, grid = _write(job, report, scratch / "final")
    made.save(scratch / "final")  # by which our own reader knows the codes
    written = Checkpoint.open(scratch / "final")
    after = _measured(job, load(written, job.kind, attentions=False)[0], answers, job.teachers[0].loaded)
    made.checks = [_loads(written, after)]
    made.distillation = distillation(
        job.teachers, job.student, job.settings, job.objective, job.fit, answers, job.rows, trained,
        (*before, after), grid,
    )  # fmt: skip
    made.save(scratch / "final")
    give_name(scratch / "final", out)
    shutil.rmtree(scratch, ignore_errors=True)


def _first() -> AbstractContextManager[object]:
    """One process before the others, so that a cache is filled once."""
    if world_size() == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=devices.best().type == "cpu").main_process_first()  # type: ignore[no-any-return]


def _meet() -> None:
    """Wait until every process is here: the folder has its name."""
    with _first():
        pass


def _prepare(source: Checkpoint, settings: DistillSettings, open: Open, seed: int, progress: Progress) -> _Job:
    teachers = find_teachers(source, settings, open, attentions=_weighs(settings, ATTENTION))
    kind = teachers[0].kind
    weights: dict[str, float] = {str(name): one for name, one in settings.losses.items()}
    weights = weights or {DEFAULT_LOSS.get(kind, "js" if settings.on_policy else "forward_kl"): 1.0}
    _refuse_losses(kind, weights, settings)
    refuse(settings, kind)
    tokenizer = load_tokenizer(source)
    rows = load_rows(settings.data, tokenizer, kind, settings.masked_frac, seed)
    student = find_student(
        teachers[0], settings, open, rows, derive(seed, "student"), attentions=_weighs(settings, ATTENTION)
    )
    inside = any(weights.get(name, 0) > 0 for name in (*HIDDEN, *ATTENTION, "sentence"))
    fitted = fit(teachers, student, settings, kind, weights, load_insides=inside)
    objective = Objective(
        kind=kind,
        weights={name: weight for name, weight in weights.items() if weight > 0},
        temperature=settings.temperature,
        beta=settings.beta,
        maps=fitted.maps,
        vocabulary=fitted.vocabulary.size,
        pooling=pooling_of(source.folder) if kind == "embedding" else "mean",
        phase_frac=settings.phase_frac,
    )
    for note in [*fitted.notes, *(note for one in teachers for note in one.notes), *student.notes]:
        progress.message(note)
    return _Job(source, settings, teachers, student, rows, objective, fitted, progress, seed)


def _weighs(settings: DistillSettings, names: Sequence[str]) -> bool:
    return any(weight > 0 for name, weight in settings.losses.items() if name in names)


def _refuse_losses(kind: Kind, weights: Mapping[str, float], settings: DistillSettings) -> None:
    asked = {name for name, weight in weights.items() if weight > 0}
    if kind == "embedding":
        wrong, why = asked & {"forward_kl", "reverse_kl", "js", "ce"}, "a sentence encoder predicts nothing"
    else:
        wrong, why = asked & {"sentence"}, f"a {kind} model gives no sentence vector"
    if wrong:
        raise LLMCompressError(f"losses: {', '.join(sorted(wrong))}: {why}")
    if kind == "embedding" and settings.cache is not None:
        raise LLMCompressError(
            "cache: holds predictions, and a sentence encoder predicts nothing", "leave out the cache"
        )


def _train(job: _Job, answers: Answers, folder: Path) -> tuple[Training, OnPolicy | None]:
    student = job.student.model
    if job.student.quantized:
        _put_on_grid(job)
    for name, parameter in student.named_parameters():
        if "pooler" in name:  # made anew, not used, and without a gradient
            parameter.requires_grad_(False)
    torch.manual_seed(derive(job.seed, "projections"))
    distiller = Distiller(student, answers.train, job.objective, job.fit.widths).to(devices.best())
    job.fit.projection_parameters = sum(one.numel() for one in distiller.projections.parameters())
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


def _measured(job: _Job, model: nn.Module, answers: Answers, beside: nn.Module | None = None) -> Figures:
    """A student's figures on the held-out rows, and the speed of a model beside it."""
    of = job.fit.vocabulary.size, job.objective.pooling, beside
    return measure(model, answers.heldout, _batches(job), job.kind, *of)


def _teacher_figures(job: _Job, answers: Answers) -> Figures | None:
    """The first teacher's figures, where it is in memory."""
    if job.teachers[0].loaded is None:
        return answers.teacher_figures
    first = job.teachers[0].model()
    return measure(first, None, _batches(job), job.kind, job.fit.vocabulary.size, job.objective.pooling)


def _batches(job: _Job) -> list[dict[str, torch.Tensor]]:
    size = job.settings.training.batch_size
    held = job.rows.heldout
    return [
        {name: value.to(devices.best()) for name, value in job.rows.batch(held[at : at + size]).items()}
        for at in range(0, len(held), size)
    ]


def _loads(written: Checkpoint, after: Figures) -> Check:
    """The figures of the report are those of the files, read again."""
    written.require_finite()
    detail = f"the files were loaded again, all weights finite, and gave the {after.num_items} held-out predictions"
    return Check(name="loads", passed=True, detail=detail)


def _write(job: _Job, report: RunReport, folder: Path) -> tuple[RunReport, GridTraining | None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if job.grids:
        assert job.student.checkpoint is not None
        made, changed = write_on_grid(job.student.model, job.grids, job.student.checkpoint, folder)
        kept = report.model_copy(update={"linears": made.linears, "output": made.output})
        kept.calibration = made.calibration
        return kept, GridTraining(
            rank=job.settings.adapter.rank, num_linears=len(job.grids), changed_codes_frac=changed
        )
    like = job.student.checkpoint or job.source
    report.output = write_plain(job.student.model, folder, stored_dtype(like), job.source.folder)
    return report, None
