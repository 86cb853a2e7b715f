"""Does a text that a model was made with hold what it is then asked? Runs of words that both have in common.

    texts (calibration, training) ──> words ──> every run of 13 ──> index
    items (question and answer)   ──> words ──> a run of theirs in the index?  ──> "this item was seen"

Thirteen words in a row are what GPT-3's authors took as a sign of contamination (Brown et al. 2020, appendix C) and
what lm-eval's decontamination uses; an item of 8 to 12 words counts when all of it is found, and a shorter one is too
short to tell. Case and punctuation do not count, and in scripts without spaces each character is a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LONGEST, SHORTEST = 13, 8
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case.

    >>> words("Don't panic, 42!"), words("我爱 NLP")
    (['don', 't', 'panic', '42'], ['我', '爱', 'nlp'])
    """
    return _WORD.findall(text.lower())


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found of some items; `example` is a run of words that was found."""

    num_items: int
    num_too_short: int
    num_contaminated: int
    example: str | None

    @property
    def share(self) -> float:
        """Items found, over those that are long enough to judge."""
        return self.num_contaminated / max(1, self.num_items - self.num_too_short)


class RunIndex:
    """Every run of 8 to 13 words of some texts, as hashes: runs of one length are hashed when first asked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = [words(text) for text in texts]
        self._runs: dict[int, set[int]] = {}

    def holds(self, run: Sequence[str]) -> bool:
        """Whether these words stand in a row in one of the texts."""
        length = len(run)
        if length not in self._runs:
            self._runs[length] = {hash(own) for text in self._texts for own in _runs(text, length)}
        return hash(tuple(run)) in self._runs[length]

    def look_up(self, items: Iterable[str]) -> Seen:
        """How many of the items share a run with the texts."""
        num_items = num_too_short = num_contaminated = 0
        example = None
        for item in items:
            item_words = words(item)
            num_items += 1
            if len(item_words) < SHORTEST:
                num_too_short += 1
                continue
            hit = next((run for run in _runs(item_words, min(LONGEST, len(item_words))) if self.holds(run)), None)
            if hit is not None:
                num_contaminated += 1
                example = example or " ".join(hit)
        return Seen(num_items, num_too_short, num_contaminated, example)


def _runs(spoken: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(spoken[start : start + length]) for start in range(len(spoken) - length + 1))
