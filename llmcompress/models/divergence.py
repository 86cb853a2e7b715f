"""KL divergence of two models' next-token distributions: the one kernel of it.

    KL(p || q) = sum_v p_v (log p_v - log q_v)    in nats, never negative, 0 where both agree

Who asks wants another precision, and its numbers depend on it: what is trained on takes float32 and a floor (`LOWEST`),
what is reported takes float64 and none. So the kernel is given log-probabilities, and `log_probs` makes them.

Shapes: T tokens (any leading dimensions), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

LOWEST = -1e4
"""Stands for the logarithm of zero: exp of it is zero, and a product with zero stays zero where -inf would give NaN."""
TABLE_BYTES = 32 << 20
"""Size of one float64 [T, V] table; about four of them live at once."""


def log_probs(logits_TV: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Log-probabilities [T, V] in `dtype`; the logits' own where that is wider."""
    wide = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.to(dtype)
    return wide.log_softmax(-1)


def kl(p_TV: torch.Tensor, q_TV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) [T] of log-probabilities; every log-probability must be finite, see `floored_kl`."""
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1)


def floored_kl(p_TV: torch.Tensor, q_TV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) [T] of log-probabilities that may be -inf (a folded tail, a masked entry): `LOWEST` stands for it."""
    return kl(p_TV.clamp_min(LOWEST), q_TV.clamp_min(LOWEST))


def tables(p_logits_TV: torch.Tensor, q_logits_TV: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Both models' float64 log-probabilities, a few tokens at a time: (which tokens, log p [t, V], log q [t, V]).

    The memory beside the logits does not depend on T. The second table is computed on the first one's device.
    """
    step = max(1, TABLE_BYTES // (8 * p_logits_TV.shape[-1]))
    for start in range(0, len(p_logits_TV), step):
        tokens = slice(start, start + step)
        yield tokens, log_probs(p_logits_TV[tokens]), log_probs(q_logits_TV[tokens].to(p_logits_TV.device))
