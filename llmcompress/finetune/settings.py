"""What a user may ask of fine-tuning and merging. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llmcompress.data.settings import DataSettings, as_data
from llmcompress.training.settings import TrainingSettings

Data = Annotated[DataSettings, BeforeValidator(as_data)]


class AdaLoraSettings(BaseModel):
    """How AdaLoRA spends its budget, in shares of the run; `rank` of the stage is the average that it ends with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    initial_rank: int | None = Field(None, ge=1, description="of every linear; None: one and a half times the rank")
    warmup_frac: float = Field(0.1, ge=0, lt=1, description="share of the steps before ranks begin to fall")
    final_frac: float = Field(0.3, ge=0, lt=1, description="share of the steps after they have stopped falling")
    orthogonality: float = Field(0.5, gt=0, description="weight of the term that keeps singular vectors orthogonal")


class FinetuneSettings(BaseModel):
    """The finetune stage: a low-rank adapter on a frozen base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapter: Literal["lora", "qlora", "adalora"] = "qlora"
    data: Data
    training: TrainingSettings = TrainingSettings()
    base: Literal["auto", "full", "nf4"] = Field("auto", description="auto: nf4 for qlora, else as the checkpoint is")
    double_quant: bool = Field(False, description="base nf4: scales in 8 bits too")
    rank: int = Field(16, ge=1, description="of every adapted linear; for adalora the average at the end")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank; None: twice the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input")
    target_modules: list[str] = Field(["all-linear"], min_length=1, description="paths of linears (shell wildcards)")
    dora: bool = Field(False, description="learn each weight's magnitude apart from its direction")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank)")
    init: Literal["default", "loftq", "residual"] = Field(
        "default", description="loftq, residual: begin with what quantizing the base lost"
    )
    init_rows: int = Field(64, ge=1, description="init residual: training rows that the Hessian is taken from")
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
    return (
        [{"path": entry} if isinstance(entry, str) else entry for entry in value] if isinstance(value, list) else value
    )


class MergeSettings(BaseModel):
    """The merge stage: adapters into the weights of a checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: Annotated[list[AdapterRef], BeforeValidator(_references)] = Field(
        [], description="folders, each with a weight; none: the adapter of the finetune stage before"
    )
    onto: Literal["auto", "dequantized", "original"] = Field(
        "auto", description="NF4 values, or full-precision ones; auto: those that the adapter was trained on"
    )
    data: Annotated[DataSettings | None, BeforeValidator(as_data)] = Field(
        None, description="held-out rows to measure on; None: those of the training"
    )
    measure: bool = Field(True, description="compare both ways of merging with base plus adapter on held-out rows")
    survival: bool = Field(True, description="measure how much of the adapter a quantize stage after this one keeps")
