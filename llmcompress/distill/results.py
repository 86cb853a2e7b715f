"""What the report says of a distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmcompress.distill.fitting import Fit
from llmcompress.distill.heldout import Figures
from llmcompress.distill.layer_map import spelled
from llmcompress.distill.models import StudentEnd, TeacherEnd
from llmcompress.distill.objective import Objective
from llmcompress.distill.predictions import Answers
from llmcompress.distill.rows import Rows
from llmcompress.distill.settings import DistillSettings
from llmcompress.distill.writing import count_parameters
from llmcompress.report import Distillation, DistillScore, DistillTeacher, GridTraining, OnPolicy, Training

METRICS = (
    ("perplexity", "nll", False),
    ("accuracy", "accuracy", True),
    ("KL to the teacher", "kl", False),
    ("agreement with the teacher", "agreement", True),
    ("cosine to the teacher", "cosine", True),
)
"""Name, field of Figures, whether higher is better."""


def distillation(
    teachers: Sequence[TeacherEnd], student: StudentEnd, settings: DistillSettings, objective: Objective, fit: Fit,
    answers: Answers, rows: Rows, trained: tuple[Training, OnPolicy | None],
    figures: tuple[Figures | None, Figures, Figures], grid: GridTraining | None,
) -> Distillation:  # fmt: skip
    """figures: of the teacher, of the student before and after."""
    teacher, before, after = figures
    training, own_text = trained
    notes = [*fit.notes, *(note for one in teachers for note in one.notes), *student.notes]
    return Distillation(
        kind=objective.kind,
        teachers=[_teacher(one) for one in teachers],
        combine=settings.combine,
        student=student.said,
        student_parameters=count_parameters(student.model) - _adapters(student, training, grid),
        losses=dict(objective.weights),
        temperature=settings.temperature,
        beta=settings.beta if "js" in objective.weights else None,
        layer_maps=[spelled(pairs) for pairs in fit.maps if pairs],
        projection_parameters=fit.projection_parameters,
        phase_frac=settings.phase_frac,
        cache=answers.cached,
        on_policy=own_text,
        grid=grid,
        num_heldout=after.num_items,
        scores=scores(teacher, before, after),
        teacher_rows_per_s=after.beside_rows_per_s,
        student_rows_per_s=after.rows_per_s or None,
        data=rows.summary,
        training=training,
        notes=list(dict.fromkeys(notes)),
    )


def scores(teacher: Figures | None, before: Figures, after: Figures) -> list[DistillScore]:
    """One row per figure that was taken of the student; perplexity in the place of its logarithm."""
    found = []
    for metric, name, higher in METRICS:
        values = [getattr(one, name) if one else None for one in (teacher, before, after)]
        if values[2] is None:
            continue
        if name == "nll":
            values = [None if value is None else math.exp(min(value, 700)) for value in values]
        found.append(
            DistillScore(metric=metric, higher_is_better=higher, teacher=values[0], before=values[1], after=values[2])
        )
    return found


def _teacher(one: TeacherEnd) -> DistillTeacher:
    return DistillTeacher(
        name=one.checkpoint.name,
        hub_id=one.checkpoint.hub_id,
        identity=one.checkpoint.identity(),
        architecture=one.architecture,
        num_parameters=one.num_parameters,
        share=one.share,
    )


def _adapters(student: StudentEnd, training: Training, grid: GridTraining | None) -> int:
    """Parameters that only stand in the student while it is trained on its grid."""
    return training.trained_parameters if grid else 0
