"""One verification of the files."""

from __future__ import annotations

from pydantic import Field

from llmcompress.report.part import Part


class Check(Part):
    """One verification. Written by verify."""

    name: str
    passed: bool
    detail: str = Field(description="what was compared, over how much, the figure and the bound")
    ran: bool = Field(
        default=True, description="False: it could not be run here, detail says why; it counts for nothing"
    )
