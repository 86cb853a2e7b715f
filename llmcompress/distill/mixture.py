"""Several teachers as one distribution.

    probabilities   p = sum_i w_i p_i                  an ensemble: likely is what any teacher finds likely
    logits          p = softmax(sum_i w_i z_i / t)     a product of experts: likely is what all of them do

Weights are divided by their sum. A teacher of weight 0 is not asked, so that weights of 0 and 1 are, bit for bit, the
one teacher alone.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from llmcompress.distill.losses import log_probs

Combine = Literal["probabilities", "logits"]


class Mixture:
    """Adds up teachers one at a time, so that only one of them need be in memory."""

    def __init__(self, combine: Combine, temperature: float) -> None:
        self.combine, self.temperature = combine, temperature
        self._sum_TV: torch.Tensor | None = None

    def add(self, logits_TV: torch.Tensor, share: float) -> None:
        """One teacher's logits with its share of the whole, 0 < share <= 1."""
        if self.combine == "logits":
            term_TV = logits_TV.float() * share if share != 1.0 else logits_TV.float()
            self._sum_TV = term_TV if self._sum_TV is None else self._sum_TV + term_TV
            return
        term_TV = log_probs(logits_TV, self.temperature)
        term_TV = term_TV + math.log(share) if share != 1.0 else term_TV
        self._sum_TV = term_TV if self._sum_TV is None else torch.logaddexp(self._sum_TV, term_TV)

    def log_probs(self) -> torch.Tensor:
        """The mixture's log-probabilities [T, V], tempered."""
        assert self._sum_TV is not None, "a mixture of nothing"
        return log_probs(self._sum_TV, self.temperature) if self.combine == "logits" else self._sum_TV


def mix(
    asked: Sequence[tuple[Callable[[], torch.Tensor], float]], combine: Combine, temperature: float
) -> torch.Tensor:
    """The mixture's log-probabilities [T, V] of teachers given as (what computes its logits [T, V], its share)."""
    mixture = Mixture(combine, temperature)
    for logits, share in asked:
        mixture.add(logits(), share)
    return mixture.log_probs()


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights over their sum. At least one is positive and none negative.

    >>> shares([1, 3]), shares([0, 2])
    ((0.25, 0.75), (0.0, 1.0))
    """
    total = math.fsum(weights)
    assert total > 0 and min(weights) >= 0
    return tuple(weight / total for weight in weights)
