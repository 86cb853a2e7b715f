"""The stages that a recipe can name: their order, and where their settings are declared.

Settings are imported when a recipe names the stage and not before, so that the command line starts at once.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmcompress.located import KeyPath


class CardSettings(BaseModel):
    """The card stage: everything it says comes from the report, so there is nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


STAGES: dict[str, tuple[str, str]] = {
    "quantize": ("llmcompress.quantize.settings", "QuantizeSettings"),
    "verify": ("llmcompress.verify.stage", "VerifySettings"),
    "check": ("llmcompress.verify.check", "CheckSettings"),
    "evaluate": ("llmcompress.evaluate.stage", "EvaluateSettings"),
    "measure": ("llmcompress.evaluate.speed", "MeasureSettings"),
    "card": (__name__, "CardSettings"),
}
"""Stage names in the order in which they run, with the module and class of their settings."""


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
