"""Adapters merged into weights, and what quantizing left of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from llmcompress.report.part import Part


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


class AdapterRetention(Part):
    """What quantizing left of the adapter. Written when a quantize stage follows a merge."""

    linears: list[LinearRetention]
    kept: float = Field(description="over all linears, each weighted by ||D||^2")
    kept_rtn: float
    heldout_tokens: int
    kl: float | None = Field(description="KL(base + adapter || merged and quantized), nats per token")
    kl_rtn: float | None = Field(description="the same for plain rounding of the merged weights")
