"""Held-out rows through models: how well one predicts them, and how far the predictions of two are apart.

    heldout_loss   -log p(next token), in nats, averaged over the tokens that are trained
    row_losses     the same before the averaging: its sum over each row
    heldout_kl     KL(reference || candidate) of the next-token distribution, in nats, averaged over every token that
                   has one before it and is no padding

The softmax is float64, so no figure depends on the batch size beyond the forward's own rounding.

Shapes: B rows of a batch, S tokens, V vocabulary, T tokens counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llmcompress.data.collate import IGNORED, Example, collate
from llmcompress.errors import LLMCompressError
from llmcompress.models.divergence import kl, log_probs


def heldout_loss(model: Any, rows: Sequence[Example], padding: int, batch_size: int) -> tuple[float, int]:
    """Mean negative log-likelihood over all trained tokens of `rows`, in nats (NaN where there is none), and their
    number; in eval mode.
    """
    losses_N, counts_N = row_losses(model, rows, padding, batch_size)
    count = int(counts_N.sum())
    return (float(losses_N.sum()) / count if count else math.nan), count


def row_losses(model: Any, rows: Sequence[Example], padding: int, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of -log p over the trained tokens of each row, in nats, float64 [N], and their number, int64 [N]; in eval
    mode."""
    losses: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch, _ in _batches(rows, padding, batch_size):
            labels_BS = batch.pop("labels").to(model.device)[:, 1:]
            logits_BSV = _logits(model, batch)[:, :-1]
            counts_BS = labels_BS != IGNORED
            log_probs_TV = log_probs(logits_BSV[counts_BS])
            loss_BS = torch.zeros(labels_BS.shape, dtype=torch.float64, device=labels_BS.device)
            loss_BS[counts_BS] = -log_probs_TV.gather(-1, labels_BS[counts_BS][:, None])[:, 0]
            losses.append(loss_BS.sum(-1).cpu())
            counts.append(counts_BS.sum(-1).cpu())
    model.train(was_training)
    return torch.cat(losses), torch.cat(counts)


def ratio_interval(part_N: torch.Tensor, whole_N: torch.Tensor) -> tuple[float, float] | None:
    """95% interval of sum(part) / sum(whole) over paired rows, by Fieller's theorem (J. R. Stat. Soc. B 16, 1954).

    Every ratio r is in it for which the mean of part - r whole is not told from 0 by Student's t; None where that is no
    interval, since the mean of `whole` itself is not told from 0, or for a single row.
    """
    from scipy.special import stdtrit

    num_rows = len(part_N)
    if num_rows < 2:
        return None
    both_2N = torch.stack([part_N, whole_N]).double()
    (part, whole), spread = both_2N.mean(1).tolist(), torch.cov(both_2N) * float(stdtrit(num_rows - 1, 0.975)) ** 2
    (of_part, mixed), (_, of_whole) = (spread / num_rows).tolist()
    square, linear, constant = whole**2 - of_whole, part * whole - mixed, part**2 - of_part
    if square <= 0:
        return None
    root = math.sqrt(max(linear**2 - square * constant, 0.0))
    return (linear - root) / square, (linear + root) / square


def heldout_kl(
    reference: Any, candidate: Any, rows: Sequence[Example], padding: int, batch_size: int
) -> tuple[float, int]:
    """Mean KL over the predicted tokens of `rows`, and their number.

    Raises: LLMCompressError when the vocabularies differ or logits are not finite.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch, lengths in _batches(rows, padding, batch_size):
            del batch["labels"]
            first_BSV, second_BSV = (_logits(model, batch) for model in (reference, candidate))
            if first_BSV.shape != second_BSV.shape:
                sizes = f"{first_BSV.shape[-1]} and {second_BSV.shape[-1]}"
                raise LLMCompressError(f"vocabularies of {sizes} cannot be compared")
            for row, length in enumerate(lengths):
                p_TV, q_TV = (log_probs(logits[row, : length - 1].cpu()) for logits in (first_BSV, second_BSV))
                total += float(kl(p_TV, q_TV).sum())
                count += length - 1
    if not count or math.isnan(total):
        raise LLMCompressError("no held-out token to compare on, or logits that are not finite")
    return total / count, count


def _batches(
    rows: Sequence[Example], padding: int, batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
    """Batches, and the lengths of their rows."""
    for start in range(0, len(rows), batch_size):
        group = rows[start : start + batch_size]
        yield collate(group, padding), [len(row.ids) for row in group]


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits
