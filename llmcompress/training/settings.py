"""What a user may say about training. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainingSettings(BaseModel):
    """How a model is trained, whatever it is trained for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="of the learning rate")
    warmup_frac: float = Field(0.03, ge=0, lt=1, description="share of the steps over which it rises")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are scaled down to it")
    epochs: float = Field(1.0, gt=0, description="times that the data is gone through")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; None: as many as the epochs take")
    batch_size: int = Field(8, ge=1, description="rows that a process computes together")
    accumulation: int = Field(1, ge=1, description="batches that make one optimizer step")
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on an accelerator, float32 on a CPU"
    )
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; None: ten in a run")
