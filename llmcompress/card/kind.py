"""What kind of thing a card describes, and the set of kinds known: quantized, adapter, merged, distilled.

A kind is one file in `kinds/` that binds ENTRY. It says whether a report is its own, and gives what only it can say:

    one sentence for the top of the card     what the thing is and how it was made
    facts for the table below it             ["how much of the adapter survived", "93 %"]
    whole sections                           drawn where the kind had a part in the making, whatever came after it
    metadata                                 base_model_relation, library_name, tags

A merged model that was then quantized is of the kind `quantized` (its first sentence), and shows `merged`'s sections
too, since the report has that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from llmcompress.registry import Registry
from llmcompress.report import RunReport

Relation = Literal["adapter", "merge", "quantized", "finetune"]


class Kind(Protocol):
    """One kind of card. rank: of kinds that a report belongs to, the one with the lowest gives the first sentence."""

    name: str
    rank: int
    relation: Relation
    library: str

    def owns(self, report: RunReport) -> bool:
        """Whether the output of this report is of this kind."""
        ...

    def sentence(self, report: RunReport) -> str:
        """What it is and how it was made, as Markdown."""
        ...

    def facts(self, report: RunReport) -> Sequence[tuple[str, str]]:
        """Rows for the table at the top, as Markdown; empty where the kind had no part."""
        ...

    def sections(self, report: RunReport) -> Sequence[str]:
        """Sections of its own, as Markdown; empty where the kind had no part."""
        ...

    def tags(self, report: RunReport) -> Sequence[str]:
        """Tags for the front matter; empty where the kind had no part."""
        ...


KINDS: Registry[Kind] = Registry("kind of card", "llmcompress.card.kinds")


def kind_of_card(report: RunReport) -> Kind | None:
    """The kind that the report's output is of, or None where no kind knows it."""
    found = sorted((kind for kind in KINDS if kind.owns(report)), key=lambda kind: kind.rank)
    return found[0] if found else None
