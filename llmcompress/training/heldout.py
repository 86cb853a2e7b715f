"""Held-out rows through two models: how far the second's predictions are from the first's.

KL(reference || candidate) of the next-token distribution, in nats, averaged over every token that has one before it and
is no padding. The softmax is float64.

Shapes: B rows, S tokens, V vocabulary, T tokens counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llmcompress.data.examples import Example, collate
from llmcompress.errors import LLMCompressError


def heldout_kl(
    reference: Any, candidate: Any, rows: Sequence[Example], padding: int, batch_size: int
) -> tuple[float, int]:
    """Mean KL over the predicted tokens of `rows`, and their number.

    Raises: LLMCompressError when the vocabularies differ or logits are not finite.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            group = rows[start : start + batch_size]
            lengths = [len(row.ids) - 1 for row in group]
            batch = {key: value for key, value in collate(group, padding).items() if key != "labels"}
            logs = []
            for model in (reference, candidate):
                there = {key: value.to(model.device) for key, value in batch.items()}
                logs.append(model(**there, use_cache=False).logits)
            first, second = logs
            if first.shape != second.shape:
                raise LLMCompressError(f"vocabularies of {first.shape[-1]} and {second.shape[-1]} cannot be compared")
            for row, length in enumerate(lengths):
                p_TV = torch.log_softmax(first[row, :length].double().cpu(), -1)
                q_TV = torch.log_softmax(second[row, :length].double().cpu(), -1)
                total += float((p_TV.exp() * (p_TV - q_TV)).sum())
                count += length
    if not count or not total == total:
        raise LLMCompressError("no held-out token to compare on, or logits that are not finite")
    return total / count, count
