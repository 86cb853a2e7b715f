"""What the report says of a distillation: the figures of a student and its teacher on held-out rows, side by side.

    causal, masked    nll of the labels (perplexity is exp of it), KL(teacher || student), same likeliest token
    classification    accuracy, KL(teacher || student), same likeliest class
    embedding         cosine of the student's vector and the teacher's

Every figure is a mean over the predictions that count, at temperature 1. With a cache the KL is that of the folded
distributions (losses.fold), which is never more than the whole. Speed is the median over the batches of the
same rows, forward passes only, on this machine.

Shapes: B rows of a batch, S tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompress.data.collate import IGNORED
from llmcompress.distill import losses
from llmcompress.distill.layer_map import spelled
from llmcompress.distill.objective import NOT_INPUTS, Objective
from llmcompress.distill.predictions import TeacherPredictions
from llmcompress.distill.rows import Rows
from llmcompress.distill.settings import DistillSettings
from llmcompress.distill.student import Fit, Student
from llmcompress.distill.teachers import Predictions, PredictionSource, Teacher, pooled
from llmcompress.models.tasks import Task
from llmcompress.report import Distillation, DistillScore, DistillTeacher, GridTraining, OnPolicy, Training

METRICS = (
    ("perplexity", "nll", False),
    ("accuracy", "accuracy", True),
    ("KL to the teacher", "kl", False),
    ("agreement with the teacher", "agreement", True),
    ("cosine to the teacher", "cosine", True),
)
"""Name, field of Figures, whether higher is better."""


@dataclass(frozen=True)
class Figures:
    """Means over held-out predictions; None for what does not apply. num_items: predictions, or texts."""

    nll: float | None = None
    accuracy: float | None = None
    kl: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    num_items: int = 0
    rows_per_s: float = 0.0
    beside_rows_per_s: float | None = None


def measure(
    student: nn.Module, source: PredictionSource | None, batches: Iterable[Mapping[str, torch.Tensor]], task: Task,
    vocabulary: int, pooling: str, beside: nn.Module | None = None,
) -> Figures:  # fmt: skip
    """A model's figures on some batches.

    source: the teachers' predictions, at temperature 1, that it is held against; None: only the labels count.
    beside: a model that is timed on the same batches.
    """
    sums: dict[str, list[float]] = {name: [0.0, 0] for name in ("nll", "accuracy", "kl", "agreement", "cosine")}
    speeds: list[float] = []
    others: list[float] = []

    def add(name: str, values: torch.Tensor) -> None:
        sums[name][0] += float(values.double().sum())
        sums[name][1] += values.numel()

    was_training = student.training
    student.eval()
    with torch.inference_mode():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
            output, speed = _timed(student, inputs, task, batch["row"].numel())
            speeds.append(speed)
            others += [_timed(beside, inputs, task, batch["row"].numel())[1]] if beside is not None else []
            predicted = source.predict(inputs, batch["row"]) if source is not None else Predictions(None)
            logits_BSV = task.predictions(output)
            if logits_BSV is not None:
                _add_predictions(logits_BSV[..., :vocabulary], predicted, batch, task, add)
                continue
            student_BH = pooled(output.hidden_states[-1], batch["attention_mask"], pooling)
            for teacher in predicted.intermediates[:1]:
                teacher_BH = pooled(teacher.hidden[-1], batch["attention_mask"], pooling)
                if student_BH.shape == teacher_BH.shape:
                    add("cosine", 1 - losses.hidden_cosine(student_BH, teacher_BH))
    student.train(was_training)
    means = {name: total / count if count else None for name, (total, count) in sums.items()}
    count = int(max(entry[1] for entry in sums.values()))
    speed = statistics.median(speeds) if speeds else 0.0
    return Figures(
        **means, num_items=count, rows_per_s=speed, beside_rows_per_s=statistics.median(others) if others else None
    )


def _timed(model: nn.Module, inputs: Mapping[str, torch.Tensor], task: Task, rows: int) -> tuple[Any, float]:
    """A model's output on a batch, and its rows per second."""
    began = time.perf_counter()
    output = task.run(model, inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return output, rows / (time.perf_counter() - began)


def _add_predictions(
    logits_BSV: torch.Tensor, predicted: Predictions, batch: Mapping[str, torch.Tensor], task: Task, add: Any
) -> None:
    counts_BS, labels_BS = task.targets(batch)
    student_BSV = losses.log_probs(logits_BSV)
    if predicted.target is not None:
        student, teacher = student_BSV[counts_BS], predicted.target[:, : counts_BS.shape[1]][counts_BS]
        teacher_first = teacher.argmax(-1)
        student_first = student.argmax(-1)
        if predicted.ids_BSK is not None:
            ids_TK = predicted.ids_BSK[:, : counts_BS.shape[1]][counts_BS]
            student, teacher_first = losses.folded(student, ids_TK), ids_TK[:, 0]
        add("kl", losses.forward_kl(student, teacher))
        add("agreement", (student_first == teacher_first).float())
    labelled_BS = labels_BS != IGNORED
    if bool(labelled_BS.any()):
        student, labels = student_BSV[labelled_BS], labels_BS[labelled_BS]
        add("nll", -student.gather(-1, labels[:, None])[:, 0])
        if task.metric == "accuracy":
            add("accuracy", (student.argmax(-1) == labels).float())


def distillation(
    teachers: Sequence[Teacher], student: Student, settings: DistillSettings, objective: Objective, fit: Fit,
    predictions: TeacherPredictions, rows: Rows, trained: tuple[Training, OnPolicy | None],
    figures: tuple[Figures | None, Figures, Figures], grid: GridTraining | None,
) -> Distillation:  # fmt: skip
    """figures: of the teacher, of the student before and after."""
    teacher, before, after = figures
    training, own_text = trained
    notes = [*fit.notes, *(note for each in teachers for note in each.notes), *student.notes]
    return Distillation(
        kind=objective.task.name,
        teachers=[
            DistillTeacher(
                name=each.checkpoint.name,
                hub_id=each.checkpoint.hub_id,
                identity=each.checkpoint.identity(),
                architecture=each.architecture,
                num_parameters=each.num_parameters,
                share=each.share,
            )
            for each in teachers
        ],
        combine=settings.combine,
        student=student.origin,
        # parameters that only stand in the student while it is trained on its grid are no part of it
        student_parameters=sum(parameter.numel() for parameter in student.model.parameters())
        - (training.trained_parameters if grid else 0),
        losses=dict(objective.weights),
        temperature=settings.temperature,
        beta=settings.beta if "js" in objective.weights else None,
        layer_maps=[spelled(pairs) for pairs in fit.maps if pairs],
        projection_parameters=fit.projection_parameters,
        phase_frac=settings.phase_frac,
        cache=predictions.cached,
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
    rows = []
    for metric, name, higher in METRICS:
        values = [getattr(figures, name) if figures else None for figures in (teacher, before, after)]
        if values[2] is None:
            continue
        if name == "nll":
            values = [None if value is None else math.exp(min(value, 700)) for value in values]
        rows.append(
            DistillScore(metric=metric, higher_is_better=higher, teacher=values[0], before=values[1], after=values[2])
        )
    return rows
