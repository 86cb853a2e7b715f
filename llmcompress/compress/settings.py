"""What a user may ask of quantization. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llmcompress.compress.methods.base import METHODS, LinearMethod, MethodSettings
from llmcompress.compress.scheme import Scheme, preset
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import default_format


class Override(BaseModel):
    """Another grid for the linears whose path matches `pattern` (shell wildcards); the first match counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str
    scheme: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None


class QuantizeSettings(BaseModel):
    """The quantize stage. None means: as the scheme, the method or the calibration set has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str = Field("W4A16", description="preset: W2A16 W3A16 W4A16 W8A16 NF4 NF4-DQ")
    group_size: int | None = Field(None, description="in_features sharing a scale; -1 = one scale per row")
    symmetric: bool | None = Field(None, description="zero point fixed at mid-range")
    double_quant: bool | None = Field(None, description="NF4: store the scales in 8 bits")
    method: str = Field("gptq", description="how codes are chosen: rtn, gptq")
    method_settings: dict[str, Any] = Field({}, description="knobs of the method, e.g. dampening_frac")
    effort: Literal["standard", "max"] = Field(
        "standard", description="max: also tune all scales together by KL to the original; both models in memory"
    )
    asymmetric_calibration: bool | None = Field(
        None, description="also aim at the original's output through its own inputs; None: with effort max"
    )
    tune_steps: int = Field(160, ge=1, description="of effort max, 2048 tokens each")
    refine_sweeps: int = Field(4, ge=0, description="of coordinate descent after the method; 0: none")
    format: list[str] = Field(
        [], description="layouts to write; empty: compressed_tensors for integer grids, bitsandbytes for NF4"
    )
    calibration: str | None = Field(
        None, description="a named set, a YAML, .txt or .jsonl; None: a bundled model's own"
    )
    num_samples: int | None = Field(None, ge=1, description="rows of calibration text")
    seq_len: int | None = Field(None, ge=2, description="tokens per row")
    batch_tokens: int = Field(1024, ge=1, description="calibration tokens that pass through a layer together")
    activation_memory_mb: int = Field(
        4096, ge=0, description="MiB that calibration text may hold between and inside layers; beyond it, recompute"
    )
    ignore: list[str] = Field([], description="paths of linears to leave in full precision (shell wildcards)")
    overrides: list[Override] = Field([], description="other grids for some linears")
    on_failure: Literal["raise", "rtn"] = Field("raise", description="what to do with a linear that cannot be solved")

    @field_validator("format", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    def weight_scheme(self) -> Scheme:
        """What becomes of a linear that no override names.

        Raises: LLMCompressError for an unknown preset or an impossible combination.
        """
        return preset(self.scheme, group_size=self.group_size, symmetric=self.symmetric, double_quant=self.double_quant)

    def override_scheme(self, override: Override) -> Scheme:
        """The scheme of one override: its own preset, or the default, with its changes."""
        name = override.scheme or self.scheme
        inherited = {} if override.scheme else {"group_size": self.group_size, "symmetric": self.symmetric}
        changes = {"group_size": override.group_size, "symmetric": override.symmetric}
        given = {key: value for key, value in changes.items() if value is not None}
        return preset(name, f"override {override.pattern!r}", **(inherited | given))

    def solver(self) -> tuple[LinearMethod, MethodSettings]:
        """The method and its own settings. Raises: LLMCompressError, one for each knob that it does not have."""
        method = METHODS.get(self.method)
        try:
            return method, method.settings(**self.method_settings)
        except ValidationError as error:
            raise_all(
                [
                    LLMCompressError(
                        f"method {method.name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}",
                        f"its knobs: {', '.join(method.settings.model_fields) or 'none'}",
                    )
                    for problem in error.errors()
                ]
            )
            raise

    def runs_original(self) -> bool:
        """Whether the original model runs beside the quantized one (asymmetric calibration)."""
        return self.effort == "max" if self.asymmetric_calibration is None else self.asymmetric_calibration

    def formats(self) -> list[str]:
        """The layouts to write, with the default resolved."""
        return list(self.format) or [default_format(self.weight_scheme()).name]
