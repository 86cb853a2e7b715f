"""What a user may ask of fine-tuning and merging. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llmcompress.config import options
from llmcompress.data.settings import DataSettings, as_data
from llmcompress.training.settings import TrainingSettings

option = partial(options.option, group="Adapter")
MERGE = "Merge"
"""Headings of the options in `--help`."""
Data = Annotated[DataSettings, BeforeValidator(as_data)]


class AdaLoraSettings(BaseModel):
    """How AdaLoRA spends its budget, in shares of the run; `rank` of the stage is the average that it ends with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    initial_rank: int | None = option(
        None, "AdaLoRA: initial rank of every linear. [default: 1.5 times --rank]", metavar="R", ge=1
    )
    warmup_frac: float = option(
        0.1, "AdaLoRA: share of the steps before the ranks are cut.",
        flag="--rank-warmup-frac", metavar="SHARE", ge=0, lt=1
    )  # fmt: skip
    final_frac: float = option(
        0.3, "AdaLoRA: share of the steps after the ranks are cut.",
        flag="--rank-final-frac", metavar="SHARE", ge=0, lt=1
    )  # fmt: skip
    orthogonality: float = option(
        0.5, "AdaLoRA: weight of the penalty that keeps singular vectors orthogonal.", metavar="W", gt=0
    )


class FinetuneSettings(BaseModel):
    """The finetune stage: a low-rank adapter on a frozen base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: Literal["lora", "qlora", "adalora"] = option("qlora", "Kind of adapter.")
    rank: int = option(16, "Rank of every adapted linear; AdaLoRA: their average at the end.", metavar="R", ge=1)
    alpha: float | None = option(
        None, "Numerator of the update's scale, alpha / rank. [default: twice --rank]", metavar="ALPHA", gt=0
    )
    dropout: float = option(0.0, "Dropout on the adapter's input.", metavar="P", ge=0, lt=1)
    target_modules: list[str] = option(
        ["all-linear"], "Linears to adapt, by path (shell wildcards); repeatable.",
        flag="--target", metavar="PATTERN", min_length=1,
    )  # fmt: skip
    dora: bool = option(False, "DoRA: magnitude of each weight trained apart from its direction.")
    rslora: bool = option(False, "rsLoRA: update scaled by alpha / sqrt(rank).")
    init: Literal["default", "loftq", "residual"] = option(
        "default", "Initial adapter; loftq and residual: the error of the quantized base."
    )
    init_rows: int = option(64, "Training rows for the Hessian of --init residual.", metavar="N", ge=1)
    base: Literal["auto", "full", "nf4"] = option(
        "auto", "Precision of the frozen base; auto: nf4 for qlora, else as stored."
    )
    double_quant: bool = option(False, "NF4 base with its scales in 8 bits.")
    data: Data
    training: TrainingSettings = TrainingSettings()
    adalora: AdaLoraSettings = AdaLoraSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneSettings:
        if self.adapter == "qlora" and self.base == "full":
            raise ValueError("qlora trains on a base of base: nf4; for a full one choose adapter: lora")
        if self.adapter == "adalora" and (self.dora or self.rslora or self.init != "default"):
            raise ValueError("adalora goes with neither dora, rslora nor another init")
        if self.adalora.warmup_frac + self.adalora.final_frac >= 1:
            raise ValueError("adalora: warmup_frac and final_frac leave no step in which ranks could fall")
        return self


class AdapterRef(BaseModel):
    """An adapter to merge, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, description="folder of a PEFT adapter")
    weight: float = Field(1.0, description="its update is multiplied by this")


def _references(value: Any) -> Any:
    """`FOLDER` and `FOLDER:WEIGHT` as references, in the place of the long form."""
    if not isinstance(value, list):
        return value
    return [_reference(entry) if isinstance(entry, str) else entry for entry in value]


def _reference(text: str) -> dict[str, Any]:
    path, colon, weight = text.rpartition(":")
    try:
        return {"path": text} if not colon or Path(text).exists() else {"path": path, "weight": float(weight)}
    except ValueError:
        return {"path": text}


class MergeSettings(BaseModel):
    """The merge stage: adapters into the weights of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: Annotated[list[AdapterRef], BeforeValidator(_references)] = option(
        [], "Adapters with their weights. [default: the one of the finetune stage before]", hidden=True
    )
    onto: Literal["auto", "dequantized", "original"] = option(
        "auto", "Weights to merge onto; auto: those that the adapter was trained on.", group=MERGE
    )
    data: Annotated[DataSettings | None, BeforeValidator(as_data)] = option(
        None, "Rows to measure the merge on. [default: held-out rows of the training]", group=MERGE, metavar="DATA"
    )
    measure: bool = option(
        True, "Comparison of both ways of merging with base plus adapter, on held-out rows.", group=MERGE
    )
    survival: bool = option(
        True, "Measurement of what a quantize stage after this one keeps of the adapter.", group=MERGE
    )
