"""Which engines load a checkpoint, by the rules of their own loaders."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.report.part import Part


class Finding(Part):
    """One rule of an engine that a checkpoint breaks. Written by check."""

    rule: str
    level: Literal["refuses", "warns", "unknown"]
    detail: str
    source: str = Field(description="where the rule was read")


class EngineVerdict(Part):
    """Whether one engine loads the checkpoint, by the rules of its loader. Written by check."""

    engine: str
    version: str
    loads: bool | None = Field(description="None: the layout was not looked into in this engine")
    needs: list[str] = Field(default=[], description="packages beside the engine itself")
    findings: list[Finding] = []
