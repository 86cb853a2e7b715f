"""What a user may ask of verifying and checking. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from llmcompress.config.options import option


def _engines() -> list[str]:
    from llmcompress.verify.compatibility import tables

    return sorted(tables())


class VerifySettings(BaseModel):
    """The verify stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward: bool = option(True, "Forward passes of both models: logits, generation, the engine's own reading.")
    logits_bound: float = option(
        0.5, "Largest relative squared error of the logits, each less its mean; unrelated models have 1.",
        metavar="BOUND", gt=0, allow_inf_nan=False,
    )  # fmt: skip


class CheckSettings(BaseModel):
    """The check stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str | None = option(None, "Engine to judge. [default: all of them]", choices=_engines)
