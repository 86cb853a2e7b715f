"""What a user may ask of quantization. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator

from llmcompress.compress.methods.base import METHODS, LinearMethod, MethodSettings
from llmcompress.compress.scheme import PRESETS, Scheme, preset
from llmcompress.config.options import option, pairs
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import FORMATS, default_format

SCHEME, METHOD, CALIBRATION = "Scheme", "Method", "Calibration"
"""Headings of the options in `--help`."""


class Override(BaseModel):
    """Another grid for the linears whose path matches `pattern` (shell wildcards); the first match counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str
    scheme: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None


def _override_pairs(value: Any) -> Any:
    """`PATTERN=SCHEME` as an override, in the place of the long form."""
    if not isinstance(value, list):
        return value
    pairs = [entry.partition("=") if isinstance(entry, str) else entry for entry in value]
    return [{"pattern": pair[0], "scheme": pair[2]} if isinstance(pair, tuple) else pair for pair in pairs]


class QuantizeSettings(BaseModel):
    """The quantize stage. None means: as the scheme, the method or the calibration set has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str = option("W4A16", "Preset that the grid is taken from.", group=SCHEME, choices=lambda: PRESETS)
    group_size: int | None = option(
        None, "Input features that share a scale; -1: one scale per row. [default: as the preset]",
        group=SCHEME, metavar="N",
    )  # fmt: skip
    symmetric: bool | None = option(
        None, "Zero point at mid-range, or one per group. [default: as the preset]",
        group=SCHEME, negative="--asymmetric",
    )  # fmt: skip
    double_quant: bool | None = option(None, "NF4 only: scales stored in 8 bits.", group=SCHEME)
    overrides: Annotated[list[Override], BeforeValidator(_override_pairs)] = option(
        [], "Another preset for the linears whose path matches; repeatable.",
        group=SCHEME, flag="--override", metavar="PATTERN=SCHEME",
    )  # fmt: skip
    ignore: list[str] = option(
        [], "Linears to leave in full precision, by path (shell wildcards); repeatable.",
        group=SCHEME, metavar="PATTERN",
    )  # fmt: skip
    include: list[str] = option(
        [], "Linears of the decoder layers to compress, by path; the others stay; repeatable. [default: all]",
        group=SCHEME, metavar="PATTERN",
    )  # fmt: skip

    method: str = option("gptq", "Algorithm that chooses the codes.", group=METHOD, choices=METHODS.names)
    method_settings: Annotated[dict[str, Any], BeforeValidator(pairs)] = option(
        {}, "Settings of the method, such as dampening_frac=0.1; repeatable.",
        group=METHOD, flag="--method-setting", metavar="KEY=VALUE",
    )  # fmt: skip
    refine_sweeps: int = option(
        4, "Sweeps of coordinate descent after the method; 0: none.", group=METHOD, metavar="N", ge=0
    )
    asymmetric_calibration: bool | None = option(
        None, "Calibration against the output of the original model, run beside. [default: with --effort max]",
        group=METHOD,
    )  # fmt: skip
    effort: Literal["standard", "max"] = option(
        "standard", "Effort; max also tunes all codes and scales together by KL, with both models in memory.",
        group=METHOD,
    )  # fmt: skip
    tune_steps: int = option(160, "Steps of --effort max, of 2048 tokens each.", group=METHOD, metavar="N", ge=1)
    on_failure: Literal["raise", "rtn"] = option(
        "raise", "What happens to a linear that cannot be solved: error, or rounding to nearest.", group=METHOD
    )

    calibration: str | None = option(
        None, "Calibration set: a name, or a .yaml, .txt or .jsonl file. [default: a bundled model's own]",
        group=CALIBRATION, metavar="SET",
    )  # fmt: skip
    num_samples: int | None = option(
        None, "Calibration rows. [default: as the set]", group=CALIBRATION, metavar="N", ge=1
    )
    seq_len: int | None = option(None, "Tokens per row. [default: as the set]", group=CALIBRATION, metavar="N", ge=2)
    expert_tokens: int = option(
        256, "Calibration tokens that an expert of a mixture sees at least, its own first.",
        group=CALIBRATION, metavar="N", ge=0,
    )  # fmt: skip
    batch_tokens: int = option(
        1024, "Calibration tokens per forward pass of a block.", group=CALIBRATION, metavar="N", ge=1
    )
    activation_memory_mb: int = option(
        4096, "Memory for activations, in MiB; beyond it they are recomputed.", group=CALIBRATION, metavar="MIB", ge=0
    )

    format: list[str] = option(
        [], "Layout on disk; several, separated by commas, give a folder each. [default: by the grid]",
        choices=FORMATS.names,
    )  # fmt: skip

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
