"""The parts of the report that speak of training: the data, the run of the trainer, and what was distilled from what.

report.py gathers them with the others; who reads a report imports them from there.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.part import Part


class RejectedRows(Part):
    """Rows of training data that were not used, for one reason."""

    reason: str
    count: int
    places: list[str] = Field(description="file:line of the first few")


class TrainingData(Part):
    """The text that was trained on. Written by finetune and distill."""

    source: str = Field(description="file name, or dataset id")
    sha256: str = Field(description="of the files' bytes")
    kind: Literal["text", "prompt", "instruction", "chat"]
    chat_template: bool
    loss_on: Literal["completion", "all"]
    seq_len: int
    packing: bool
    num_examples: int = Field(description="examples trained on")
    num_rows: int = Field(description="rows that they were laid into")
    num_heldout: int
    num_tokens: int = Field(description="of the examples trained on")
    num_learned: int = Field(description="tokens among them that are learned")
    heldout_also_trained: int = Field(description="held-out examples that are also trained on, token for token")
    rejected: list[RejectedRows] = []


class CurvePoint(Part):
    """The training loss at a step, or the mean since the point before."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float | None = None


class Training(Part):
    """One run of the trainer. Written by finetune and distill."""

    steps: int
    epochs: float
    effective_batch: int = Field(description="rows per optimizer step, over all processes")
    trained_parameters: int
    resumed_from: int | None = Field(default=None, description="step of the checkpoint that an interrupted run left")
    seconds: float = Field(description="of the last start; less than the whole where it was resumed")
    num_processes: int = 1
    curve: list[CurvePoint] = []


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
    num_kept: int = Field(description="likeliest tokens kept of each distribution; the mass of all others is exact")
    mean_rest: float = Field(description="mass outside them, mean over the tokens that count")
    largest_rest: float
    reused: bool = Field(description="it was there already")


class GridTraining(Part):
    """A student that was quantized before it was trained."""

    rank: int
    num_linears: int
    changed_codes_frac: float = Field(description="share of its codes that training changed")


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
    grid: GridTraining | None = None
    num_heldout: int = Field(description="held-out predictions (of embeddings: texts) that the scores are means over")
    scores: list[DistillScore]
    teacher_rows_per_s: float | None = Field(default=None, description="forward passes over held-out rows")
    student_rows_per_s: float | None = None
    data: TrainingData
    training: Training
    notes: list[str] = []
