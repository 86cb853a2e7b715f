"""The stage of this folder: card."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from llmcompress.config.stage import Stage, Work


class CardSettings(BaseModel):
    """Everything that a card says comes from the report, so there is nothing to set."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Card(Stage):
    """The model card, drawn from the report alone. Cheap, so it is always drawn anew."""

    name = "card"
    kind = "check"
    help = "Write the model card from the report."
    Settings = CardSettings
    takes_adapter = True
    always = True

    def run(self, settings: CardSettings, work: Work) -> None:
        """Save the report, then draw README.md and the figures from it."""
        from llmcompress.card.build import write_card

        work.report.save(work.out)
        write_card(work.out)
