"""What the model will see of a few examples, with the part that is not learned marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from llmcompress.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN, LEARNED = "--- shown, not learned", "+++ learned"


def preview(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, object]]:
    """Per example its place, its size, and its spans in order: decoded from the token ids, special tokens included."""
    return [
        {
            "where": one.where,
            "num_tokens": len(one.ids),
            "num_learned": sum(one.learned),
            "spans": [
                {"learned": learned, "text": str(tokenizer.decode([token for token, _ in span]))}
                for learned, span in (
                    (learned, list(group))
                    for learned, group in groupby(zip(one.ids, one.learned, strict=True), key=lambda pair: pair[1])
                )
            ],
        }
        for one in examples
    ]


def as_text(rows: Sequence[dict[str, object]]) -> str:
    """The preview for a person."""
    lines: list[str] = []
    for row in rows:
        lines.append(f"=== {row['where']}: {row['num_tokens']} tokens, {row['num_learned']} learned")
        spans = row["spans"]
        assert isinstance(spans, list)
        for span in spans:
            lines += [LEARNED if span["learned"] else SHOWN, str(span["text"])]
    return "\n".join(lines)
