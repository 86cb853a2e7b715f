"""What a user may ask of evaluating and measuring. Free of torch and NumPy, so that `--help` loads at once."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from llmcompress.config.options import option
from llmcompress.evaluate.suite import suite_names

Choice = Literal["auto", "native", "dequantized"]
EvaluateChoice = Literal["auto", "native", "dequantized", "stream"]


class EvaluateSettings(BaseModel):
    """What the user chooses: a suite, or tasks by name. `limit` caps the items of every task and the rows of every
    text, below what the suite itself allows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: str | None = option(None, "Suite: a bundled one, or a YAML file.", metavar="SUITE", choices=suite_names)
    tasks: list[str] = option(
        [], "Tasks in the place of a suite, by lm-eval's names; TASK:METRIC for another metric than acc.",
        metavar="TASK,…",
    )  # fmt: skip
    baseline: str | None = option(
        None, "Model to compare with: folder, Hub id or bundled/NAME. [default: what it was made from]", metavar="MODEL"
    )
    engine: EvaluateChoice = option(
        "auto", "Backend; native: the format's own kernels; stream: a decoder layer in memory at a time."
    )
    limit: int | None = option(
        None, "Items of a task and rows of a text at most. [default: as the suite]", metavar="N", ge=2
    )
    batch_size: int = option(8, "Sequences per batch.", metavar="N", ge=1)
    overlap_bound: float = option(
        0.01, "Contamination that is accepted: share of a task's items in the calibration or training text.",
        metavar="SHARE", ge=0, le=1,
    )  # fmt: skip
    allow_overlap: bool = option(False, "Evaluation despite contamination; the card shows it.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        """Raises: ValueError for neither a suite nor tasks, and for both."""
        if (self.suite is None) == (not self.tasks):
            raise ValueError(f"name a suite ({', '.join(suite_names())}, FILE.yaml) or tasks, one of the two")
        return self


class MeasureSettings(BaseModel):
    """The measure stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    baseline: str | None = option(
        None, "Model to compare with: folder, Hub id or bundled/NAME. [default: what it was made from]", metavar="MODEL"
    )
    engine: Choice = option("auto", "Backend; native: the format's own kernels.")
    prompt_tokens: int = option(128, "Tokens of the prompt, at most what both models take.", metavar="N", ge=1)
    new_tokens: int = option(32, "Tokens that are generated.", metavar="N", ge=1)
    rounds: int = option(5, "Timings of each model, in turn.", metavar="N", ge=1)
