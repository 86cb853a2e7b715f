"""What every part of the report is: named values, each said what it is, and nothing that nobody knows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of the report: no unknown keys, in or out."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
