"""An adapter and how it was trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.report.part import Part
from llmcompress.report.training import Training, TrainingData


class AdapterModule(Part):
    """One adapted linear. Written by finetune."""

    name: str
    shape: tuple[int, int] = Field(description="out_features, in_features")
    rank: int = Field(description="at the end of the training")


class Finetune(Part):
    """An adapter and how it was trained. Written by finetune."""

    adapter: Literal["lora", "qlora", "adalora"]
    base: str = Field(description="the checkpoint that it was trained on, as the recipe names it")
    base_identity: str = Field(description="sha256 over config.json and the tensor bytes of that checkpoint")
    base_weights: Literal["full", "nf4", "stored nf4"] = Field(description="how its linears were held in training")
    double_quant: bool = False
    full_precision_linears: dict[str, str] = Field(
        default={}, description="linear of an NF4 base in full precision -> why"
    )
    compute_dtype: str
    init: Literal["default", "loftq", "residual"]
    rank: int = Field(description="of every linear; for adalora the average that was asked for")
    initial_rank: int | None = Field(default=None, description="adalora: of every linear at the start")
    alpha: float
    dropout: float
    dora: bool
    rslora: bool
    modules: list[AdapterModule]
    data: TrainingData
    data_path: str = Field(description="where the data lay, for measurements that come later")
    training: Training
    learning_rate: float
    heldout_tokens: int = Field(description="tokens of the held-out rows that the loss is taken over")
    heldout_loss_base: float | None = Field(description="nats per token of the base as it was trained on")
    heldout_loss_initial: float | None = Field(description="with the adapter before the first step")
    heldout_loss: float | None = Field(description="with the trained adapter")

    def average_rank(self) -> float:
        """Mean over the adapted linears."""
        return sum(one.rank for one in self.modules) / len(self.modules)
