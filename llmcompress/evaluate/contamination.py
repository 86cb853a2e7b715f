"""The contamination gate: what a checkpoint was made with, against what it is about to be asked.

    report ──provenance.py──> calibration rows, training rows ──> RunIndex ─┐
    suite ──> items of every task, 13-word runs of every text ─────────────┴──> Overlap rows ──> too many: refused

A score on items that the calibration or training text holds says little about new ones. The gate comes before any model
is loaded. Text that cannot be read again (its file is gone, or it is a Hub dataset and there is no network) gives a row
that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmcompress.data.contamination import LONGEST, RunIndex, words
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.evaluate.provenance import NO_CONSENT, Consent, texts_of
from llmcompress.report import Contamination, RunReport


def overlaps(report: RunReport, parts: Mapping[str, list[str]], consent: Consent = NO_CONSENT) -> list[Contamination]:
    """What each text that made the checkpoint shares with each part of a suite (task or text name -> its items)."""
    rows: list[Contamination] = []
    for text in texts_of(report, consent):
        if text.missing is not None:
            rows.append(Contamination(text=text.name, part="*", note=f"not looked into: {text.missing}"))
            continue
        index = RunIndex(text.rows)
        for part, items in parts.items():
            seen = index.look_up(items)
            counts = {
                "num_items": seen.num_items,
                "num_too_short": seen.num_too_short,
                "num_contaminated": seen.num_contaminated,
            }
            rows.append(Contamination(text=text.name, part=part, share=seen.share, example=seen.example, **counts))
    return rows


def refuse(rows: Iterable[Contamination], bound: float, suite: str) -> None:
    """Raise LLMCompressError, a line for each part of the suite that shares more than `bound` with a text."""
    raise_all(
        [
            LLMCompressError(
                f"suite {suite}: {row.part}: {row.num_contaminated} of {row.num_items - row.num_too_short} items share "
                f"{LONGEST} words in a row with the {row.text} ({row.share:.1%}; at most {bound:.1%}), "
                f"e.g. {row.example!r}",
                "its score would say little: choose other text or another suite, or pass --allow-overlap, which the "
                "card will show",
            )
            for row in rows
            if row.share is not None and row.share > bound
        ]
    )


def text_items(content: str) -> list[str]:
    """A held-out text as items: its consecutive runs of 13 words."""
    sequence = words(content)
    return [" ".join(sequence[start : start + LONGEST]) for start in range(0, len(sequence) - LONGEST + 1, LONGEST)]
