"""What a user may say about training. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmcompress.config import options

option = partial(options.option, group="Training")


class TrainingSettings(BaseModel):
    """How a model is trained, whatever it is trained for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = option(2e-4, "Peak learning rate.", metavar="LR", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = option("cosine", "Learning rate schedule after the warmup.")
    warmup_frac: float = option(0.03, "Warmup, as a share of the steps.", metavar="SHARE", ge=0, lt=1)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", metavar="DECAY", ge=0)
    max_grad_norm: float = option(1.0, "Norm to which larger gradients are clipped.", metavar="NORM", gt=0)
    epochs: float = option(1.0, "Passes over the data.", metavar="N", gt=0)
    max_steps: int | None = option(None, "Optimizer steps. [default: as many as the epochs take]", metavar="N", ge=1)
    batch_size: int = option(8, "Rows per process and batch.", metavar="N", ge=1)
    accumulation: int = option(1, "Batches per optimizer step.", metavar="N", ge=1)
    gradient_checkpointing: bool = option(False, "Activations recomputed in the backward pass: less memory, more time.")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Compute dtype; auto: bfloat16 on an accelerator, float32 on a CPU."
    )
    save_every: int | None = option(None, "Steps between checkpoints. [default: ten in a run]", metavar="N", ge=1)
