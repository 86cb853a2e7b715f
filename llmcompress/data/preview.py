"""What the model will see of a few examples, with the part that is trained marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from llmcompress.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT, TRAINED = "--- context, not trained", "+++ trained"


def preview(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, object]]:
    """Per example its place, its size, and its spans in order: decoded from the token ids, special tokens included."""
    return [
        {
            "where": example.where,
            "num_tokens": len(example.ids),
            "num_trained": sum(example.loss_mask),
            "spans": [
                {"trained": trained, "text": str(tokenizer.decode([token for token, _ in span]))}
                for trained, span in groupby(zip(example.ids, example.loss_mask, strict=True), key=lambda pair: pair[1])
            ],
        }
        for example in examples
    ]


def as_text(rows: Sequence[dict[str, object]]) -> str:
    """The preview for a person."""
    lines: list[str] = []
    for row in rows:
        lines.append(f"=== {row['where']}: {row['num_tokens']} tokens, {row['num_trained']} trained")
        spans = row["spans"]
        assert isinstance(spans, list)
        for span in spans:
            lines += [TRAINED if span["trained"] else CONTEXT, str(span["text"])]
    return "\n".join(lines)
