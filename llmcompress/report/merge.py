"""Adapters merged into weights, and what quantizing left of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from llmcompress.report.part import Part

MAX_NOISE = 0.1
"""Largest standard deviation of a projection that is shown: beyond, rounding decides it more than the update."""


class MergedLinear(Part):
    """One linear that an update went into. Written by merge."""

    name: str
    rank: int = Field(description="sum over the adapters")
    relative_update: float = Field(description="||D|| / ||W||")
    error_over_rounding: float = Field(
        description="difference of outputs from base plus adapter, over what rounding allows"
    )


class MergedAdapter(Part):
    """One adapter that went in. Written by merge."""

    path: str
    weight: float
    kind: Literal["LORA", "ADALORA"]
    dora: bool
    sha256: str = Field(description="of adapter_model.safetensors")
    base_matches: bool | None = Field(description="trained on the very checkpoint merged onto; None: not known")


class Merge(Part):
    """Adapters merged into weights. Written by merge."""

    onto: Literal["dequantized", "original"]
    adapters: list[MergedAdapter]
    linears: list[MergedLinear]
    num_nf4_linears: int = Field(description="linears that hold NF4 values, updated or not")
    replaced_parameters: list[str] = Field(default=[], description="parameters that an adapter brought whole")
    data: dict[str, Any] | None = Field(default=None, description="settings of the rows measured on")
    heldout_tokens: int = 0
    kl_dequantized: float | None = Field(default=None, description="KL(base + adapter || merged onto NF4 values)")
    kl_original: float | None = Field(default=None, description="KL(base + adapter || merged onto the original)")
    closer: Literal["dequantized", "original"] | None = None
    not_measured: str | None = Field(default=None, description="why there is no KL, or only one")


class LinearRetention(Part):
    """How much of an update quantization kept in one linear: <Q(W+D) - Q(W), D> / <D, D>."""

    name: str
    kept: float = Field(description="with the method of the run")
    kept_rtn: float = Field(description="with plain rounding on the same grid")
    noise: float | None = Field(default=None, description="standard deviation of kept, of rounding each weight by luck")
    size: float = Field(default=0.0, description="||D||^2 over the sum of all linears")

    @property
    def tells(self) -> bool:
        """Whether the figure is of the update and not of rounding's noise."""
        return self.noise is not None and self.noise <= MAX_NOISE


class AdapterRetention(Part):
    """What quantizing left of the adapter. Written when a quantize stage follows a merge."""

    linears: list[LinearRetention]
    kept: float = Field(description="over all linears, each weighted by ||D||^2")
    kept_rtn: float
    heldout_tokens: int
    kl: float | None = Field(description="KL(base + adapter || merged and quantized), nats per token")
    kl_rtn: float | None = Field(description="the same for plain rounding of the merged weights")
    num_rows: int = Field(default=0, description="held-out rows that the losses are means over")
    loss_tokens: int = Field(default=0, description="their tokens with a loss")
    loss_base: float | None = Field(default=None, description="nats per token, the base as it was in training")
    loss_adapter: float | None = Field(default=None, description="base plus adapter")
    loss_merged: float | None = Field(default=None, description="merged, before it was quantized")
    loss_quantized: float | None = Field(default=None, description="this very file")
    gain_kept: float | None = Field(
        default=None, description="(loss_base - loss_quantized) / (loss_base - loss_adapter): 1: all of the gain"
    )
    gain_kept_interval: tuple[float, float] | None = Field(
        default=None, description="95%, Fieller over rows; None: the gain itself is not told from 0"
    )

    @property
    def telling(self) -> tuple[int, float, float] | None:
        """Of the linears whose projection is not noise: how many, and kept and kept_rtn weighted by ||D||^2."""
        rows = [row for row in self.linears if row.tells]
        total = sum(row.size for row in rows)
        if not total:
            return None
        kept, kept_rtn = (sum(getattr(row, key) * row.size for row in rows) / total for key in ("kept", "kept_rtn"))
        return len(rows), kept, kept_rtn
