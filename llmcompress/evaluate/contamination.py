"""The overlap gate: what a checkpoint was made with, against what it is about to be asked.

    report ──made_with.py──> calibration rows, training rows ──> RunIndex ─┐
    suite ──> items of every task, 13-word runs of every text ─────────────┴──> Overlap rows ──> too many: refused

A score on items that the calibration or training text holds says little about new ones. The gate comes before any model
is loaded. Text that cannot be read again (its file is gone, or it is a Hub dataset and there is no network) gives a row
that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmcompress.data.contamination import LONGEST, RunIndex, words
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.evaluate.provenance import texts_of
from llmcompress.report import Overlap, RunReport


def overlaps(report: RunReport, parts: Mapping[str, list[str]]) -> list[Overlap]:
    """What each text that made the checkpoint shares with each part of a suite (task or text name -> its items)."""
    found: list[Overlap] = []
    for text in texts_of(report):
        if text.missing is not None:
            found.append(Overlap(text=text.name, part="*", note=f"not looked into: {text.missing}"))
            continue
        index = RunIndex(text.rows)
        for part, items in parts.items():
            seen = index.look_up(items)
            counts = {"num_items": seen.num_items, "num_short": seen.num_short, "num_found": seen.num_found}
            found.append(Overlap(text=text.name, part=part, share=seen.share, example=seen.example, **counts))
    return found


def refuse(found: Iterable[Overlap], bound: float, suite: str) -> None:
    """Raise LLMCompressError, a line for each part of the suite that shares more than `bound` with a text."""
    raise_all(
        [
            LLMCompressError(
                f"suite {suite}: {one.part}: {one.num_found} of {one.num_items - one.num_short} items share "
                f"{LONGEST} words in a row with the {one.text} ({one.share:.1%}; at most {bound:.1%}), e.g. "
                f"{one.example!r}",
                "its score would say little: choose other text or another suite, or pass --allow-overlap, which the "
                "card will show",
            )
            for one in found
            if one.share is not None and one.share > bound
        ]
    )


def text_items(content: str) -> list[str]:
    """A held-out text as items: its consecutive runs of 13 words."""
    spoken = words(content)
    return [" ".join(spoken[start : start + LONGEST]) for start in range(0, len(spoken) - LONGEST + 1, LONGEST)]
