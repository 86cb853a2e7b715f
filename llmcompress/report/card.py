"""What a card says in the user's own words."""

from __future__ import annotations

from pydantic import Field

from llmcompress.report.part import Part


class CardFields(Part):
    """What the user declares for the card where the checkpoint that went in does not say it. Written by card."""

    title: str | None = None
    base_model: str | None = Field(default=None, description="Hub id")
    license: str | None = None
    tags: list[str] = []
