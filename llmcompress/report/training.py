"""A run of the trainer and its data: parts that finetune and distill share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.report.part import Part


class RejectedRows(Part):
    """Rows of training data that were not used, for one reason."""

    reason: str
    count: int
    locations: list[str] = Field(description="file:line of the first few")


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
    num_loss_tokens: int = Field(description="tokens among them that are learned")
    num_heldout_in_training: int = Field(description="held-out examples that are also trained on, token for token")
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
