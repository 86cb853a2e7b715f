"""The stage of this folder: card."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from llmcompress.config.stage import Stage, Work


class CardSettings(BaseModel):
    """What a card cannot know from the checkpoint; all else that it says comes from the report."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str | None = Field(default=None, description="Title; by default the base and what became of it.")
    base_model: str | None = Field(default=None, description="Hub id of the base, for one read from a folder.")
    license: str | None = Field(default=None, description="License of the checkpoint, in the Hub's spelling.")
    tags: list[str] = Field(default=[], description="Tags beside those of the format and the method.")


class Card(Stage):
    """The model card, drawn from the report alone. Cheap, so it is always drawn anew."""

    name = "card"
    kind = "check"
    help = "Write the model card from the report."
    Settings = CardSettings
    takes_adapter = True
    always = True

    def run(self, settings: CardSettings, work: Work) -> None:
        """Save the report with what was declared now or before, then draw README.md and the figures from it."""
        from llmcompress.card.build import write_card

        work.report.card = work.report.card.model_copy(update=settings.model_dump(exclude_defaults=True))
        work.report.save(work.out)
        write_card(work.out)
