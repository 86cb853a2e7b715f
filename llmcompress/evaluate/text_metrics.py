"""What is asked of two models at every token of a held-out text. A metric is an entry of `TEXT_METRICS`, nothing else.

    at every token    log p [V] of the baseline, log q [V] of the compressed model, and the token that comes next
    perplexity        exp of the mean of -log p[next]: what a model gave to the one token that came
    kl                sum_v p_v (log p_v - log q_v): how far the whole distribution moved; it sees damage that leaves
                      the true token's share alone, and needs far less text to tell two checkpoints apart
    top1_agreement    share of tokens where both rank the same one first

A figure of one model (`of_one`) is taken of both, and the pair's figure is their difference, token by token; other
figures are of the pair alone (`of_both`). Rows are averaged, resampled and compared with the suite's budget of the
metric's name, then go to the report: all of that is done for every entry alike.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmcompress.errors import unknown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TextMetric:
    """One metric.

    of_one(log_p_TV, next_T): its value [T] for one model. of_both(log_p_TV, log_q_TV): its value [T] for the pair.
    Exactly one of them is given. scale: from a mean to what is shown. same: what is shown of two equal models; a budget
    is the largest loss, counted from there where higher is better. least, most: what a value [T] can be; where both are
    finite, an interval has width even where all rows are equal.
    """

    name: str
    label: str
    unit: str
    same: float
    of_one: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    of_both: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    scale: Callable[[float], float] = float
    higher_is_better: bool = False
    least: float = -math.inf
    most: float = math.inf

    def loss(self, interval: tuple[float, float]) -> tuple[float, float]:
        """An interval of what is shown as an interval of what a budget bounds."""
        low, high = interval
        return (self.same - high, self.same - low) if self.higher_is_better else (low, high)


def _negative_log_likelihood(log_p_TV: torch.Tensor, next_T: torch.Tensor) -> torch.Tensor:
    return -log_p_TV.gather(1, next_T[:, None])[:, 0]


def _kl(log_p_TV: torch.Tensor, log_q_TV: torch.Tensor) -> torch.Tensor:
    from llmcompress.models.divergence import kl

    return kl(log_p_TV, log_q_TV)


def _same_top1(log_p_TV: torch.Tensor, log_q_TV: torch.Tensor) -> torch.Tensor:
    return (log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).double()


TEXT_METRICS: tuple[TextMetric, ...] = (
    TextMetric("perplexity", "perplexity", "ratio", 1.0, of_one=_negative_log_likelihood, scale=math.exp),
    TextMetric("kl", "KL(baseline || compressed)", "nats per token", 0.0, of_both=_kl, least=0.0),
    TextMetric(
        "top1_agreement",
        "same top-1 token",
        "share",
        1.0,
        of_both=_same_top1,
        higher_is_better=True,
        least=0.0,
        most=1.0,
    ),
)


def text_metric(name: str, where: str | None = None) -> TextMetric:
    """The metric called `name`. Raises: LLMCompressError for an unknown one, with the nearest."""
    known = {metric.name: metric for metric in TEXT_METRICS}
    if name not in known:
        raise unknown("text metric", name, known, where)
    return known[name]
