"""The stages that a recipe can name: what they are, their order, and where their settings are declared.

Makers turn a checkpoint into another and run in the order that the recipe gives; evidence is taken of the last one.

Settings are imported when a recipe names the stage and not before, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmcompress.config.yaml_lines import KeyPath


class CardSettings(BaseModel):
    """The card stage: everything it says comes from the report, so there is nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


MAKERS: dict[str, tuple[str, str]] = {
    "finetune": ("llmcompress.finetune.settings", "FinetuneSettings"),
    "merge": ("llmcompress.finetune.settings", "MergeSettings"),
    "distill": ("llmcompress.distill.settings", "DistillSettings"),
    "quantize": ("llmcompress.compress.settings", "QuantizeSettings"),
}
"""Names of the stages that make a checkpoint, with the module and class of their settings."""

EVIDENCE: dict[str, tuple[str, str]] = {
    "verify": ("llmcompress.verify.stage", "VerifySettings"),
    "check": ("llmcompress.verify.check", "CheckSettings"),
    "evaluate": ("llmcompress.evaluate.stage", "EvaluateSettings"),
    "measure": ("llmcompress.evaluate.speed", "MeasureSettings"),
    "card": (__name__, "CardSettings"),
}
"""The same for evidence and the card, in the order in which they run."""

STAGES = MAKERS | EVIDENCE
"""Every stage."""


def settings_class(stage: str) -> type[BaseModel]:
    """The settings of a stage, imported on first use."""
    module, name = STAGES[stage]
    found: type[BaseModel] = getattr(importlib.import_module(module), name)
    return found


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a recipe."""

    name: str
    settings: BaseModel


@dataclass
class Entry:
    """A stage as it stands in a file, before validation; `path` leads to it from the root of the file."""

    name: str
    values: dict[str, Any]
    path: KeyPath
