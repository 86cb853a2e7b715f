"""What a card says in the user's own words."""

from __future__ import annotations

from pydantic import Field

from llmcompress.report.part import Part


class CardFields(Part):
    """What the user declares for the card where the checkpoint that went in does not say it. Written by card."""

    title: str | None = Field(default=None, description="Title; by default the base and what became of it.")
    base_model: str | None = Field(default=None, description="Hub id of the base, for one read from a folder.")
    license: str | None = Field(default=None, description="License of the checkpoint, in the Hub's spelling.")
    tags: list[str] = Field(default=[], description="Tags beside those of the layout and the method.")
