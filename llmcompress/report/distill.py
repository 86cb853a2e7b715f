"""What was distilled from what, and teacher and student side by side."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.report.part import Part
from llmcompress.report.training import Training, TrainingData


class DistillTeacher(Part):
    """One teacher."""

    name: str = Field(description="as the user gave it: a folder or a Hub id")
    hub_id: str | None = None
    identity: str
    architecture: str | None = Field(default=None, description="None where only its cached predictions were at hand")
    num_parameters: int | None = None
    share: float = Field(description="its weight over the sum of all weights")


class DistillScore(Part):
    """A figure on held-out rows; None where it was not measured or makes no sense."""

    metric: str
    higher_is_better: bool
    teacher: float | None
    before: float | None = Field(description="of the student before training")
    after: float | None = Field(description="of the student as it was written and loaded again")


class CachedPredictions(Part):
    """What was kept of the teachers' predictions in the place of the teachers themselves."""

    key: str
    top_k: int = Field(description="top-k tokens kept of each distribution; the mass of all others is exact")
    mean_tail_mass: float = Field(description="mass outside them, mean over the tokens that count")
    max_tail_mass: float
    reused: bool = Field(description="it was there already")


class GridTraining(Part):
    """A student that was quantized before it was trained."""

    rank: int
    num_linears: int
    changed_codes_frac: float = Field(description="share of its codes that training changed")


class OnPolicy(Part):
    """Training on text that the student wrote itself. Counts are of this process, over the whole run."""

    lmbda: float = Field(description="probability that a batch is the student's own text")
    max_new_tokens: int
    sampling_temperature: float
    batches: int
    student_batches: int = Field(description="those among them that the student wrote")
    student_tokens: int = Field(description="that it wrote")


class Distillation(Part):
    """What was distilled from what. Written by distill."""

    kind: Literal["causal", "masked", "classification", "embedding"]
    teachers: list[DistillTeacher]
    combine: Literal["probabilities", "logits"]
    student: str = Field(description="where the student came from and what of it was kept, in one line")
    student_parameters: int
    losses: dict[str, float]
    temperature: float
    beta: float | None = Field(default=None, description="of js")
    layer_maps: list[str] = Field(default=[], description="student:teacher pairs, one map per teacher")
    projection_parameters: int = Field(default=0, description="learned, used in training alone and thrown away")
    phase_frac: float = 0.0
    cache: CachedPredictions | None = None
    on_policy: OnPolicy | None = None
    grid: GridTraining | None = None
    num_heldout: int = Field(description="held-out predictions (of embeddings: texts) that the scores are means over")
    scores: list[DistillScore]
    teacher_rows_per_s: float | None = Field(
        default=None, description="forward passes over held-out rows, in turn with the student"
    )
    student_rows_per_s: float | None = None
    data: TrainingData
    training: Training
    notes: list[str] = []
