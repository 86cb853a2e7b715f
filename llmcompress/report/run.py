"""RunReport: everything that a model card may say, and nothing that was not measured.

Each stage adds its own part, a module here; the card is drawn from the file on disk and from nothing else. A part that
was not run is absent (None or an empty list), never a made-up default. Sizes are bytes, times seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from llmcompress.errors import LLMCompressError
from llmcompress.report import store
from llmcompress.report.card import CardFields
from llmcompress.report.check import EngineVerdict
from llmcompress.report.distill import Distillation
from llmcompress.report.evaluate import Evaluation
from llmcompress.report.finetune import Finetune
from llmcompress.report.merge import AdapterRetention, Merge
from llmcompress.report.part import Part
from llmcompress.report.quantize import Calibration, LinearRow, Output, Profile, Tuning
from llmcompress.report.source import Source
from llmcompress.report.speed import Measurement
from llmcompress.report.verify import Check

OF_THE_OUTPUT = {
    "version", "created", "recipe", "seed", "environment", "stages",
    "calibration", "adapter_retention", "linears", "output", "checks", "evaluations",
}  # fmt: skip
"""Parts of a report that speak of one run or one output folder; all others are handed on to the next stage."""


class StageRow(Part):
    """One stage that ran. Written by run."""

    name: str
    key: str = Field(description="hash of inputs, settings and code version")
    status: Literal["done", "failed", "reused"]
    seconds: float
    peak_memory_bytes: int = Field(description="highest resident memory of the process so far")
    error: str | None = None


class Environment(Part):
    """Where it ran. Written by run."""

    llmcompress: str
    python: str
    libraries: dict[str, str]
    platform: str
    processor: str
    num_threads: int
    accelerator: str | None = None


class RunReport(Part):
    """The evidence of one run; see the module's docstring."""

    version: int = store.VERSION
    created: str = Field(description="UTC, ISO 8601")
    recipe: dict[str, Any] = Field(description="every value, defaults included")
    seed: int
    environment: Environment
    stages: list[StageRow] = []
    source: Source | None = None
    finetune: Finetune | None = None
    merge: Merge | None = None
    adapter_retention: AdapterRetention | None = None
    calibration: Calibration | None = None
    linears: list[LinearRow] = []
    tuning: Tuning | None = None
    output: Output | None = None
    profile: Profile | None = None
    distillation: Distillation | None = None
    checks: list[Check] = []
    engines: list[EngineVerdict] = []
    evaluations: list[Evaluation] = []
    speed: Measurement | None = None
    card: CardFields = CardFields()
    notes: list[str] = Field(default=[], description="anything else that a reader must know")

    @field_validator("recipe")
    @classmethod
    def _shaped_as_one(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        """Later verbs read it; what its stages mean is checked by who runs them again."""
        steps = recipe.get("stages", [])
        shaped = isinstance(steps, list) and all(
            isinstance(step, dict) and all(isinstance(values, dict | None) for values in step.values())
            for step in steps
        )
        if not shaped:
            raise ValueError("stages is no list of settings by name")
        return recipe

    def save(self, checkpoint: Path) -> Path:
        """Write `checkpoint`/llmcompress/report.json, whole or not at all; returns its path."""
        return store.write(checkpoint, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, checkpoint: Path) -> RunReport:
        """Read the report of an output folder; one of an older version is upgraded.

        Raises: LLMCompressError when there is none, or it does not hold what a report of its version holds.
        """
        values = store.read(checkpoint)
        try:
            return cls.model_validate(values)
        except (ValueError, RecursionError) as error:
            first = str(error).splitlines()[0]
            path = checkpoint / store.FOLDER / store.FILE
            raise LLMCompressError(f"{path}: not a report of version {values['version']} ({first})") from error
