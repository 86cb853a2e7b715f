"""Two models on the same items: how large is the difference, how sure is it, and is it within budget?

Both models answer every item, so item i gives a pair (baseline_i, compressed_i) and everything here works on the
differences. Two accuracies of 0.80 +- 0.02 look the same; the paired difference of the same run may be -0.030 with an
interval of [-0.041, -0.019], since the items' own difficulty cancels.

    interval     percentile bootstrap of the mean difference (Efron 1979)
    flips        items that became right, items that became wrong
    McNemar      were those flips a fair coin? exact binomial (McNemar 1947)
    verdict         budget            a loss is good at 0 and bad to the right
                 ------|-------->
               [pass]  |               the whole interval is within the budget
                    [ ? ]              inconclusive: more items would tell
                       |  [fail]       the whole interval is beyond it

Shapes: N items, R resamples, U distinct differences. Nothing is rounded before it is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcompress.report import Score, Verdict

Floats = NDArray[np.float64]

NUM_RESAMPLES = 10_000
CONFIDENCE_FRAC = 0.95
COUNTS_AT_ONCE = 4_000_000
"""Entries of the table of resampled counts that is held in memory (8 bytes each)."""


def score(values_N: Floats) -> Score:
    """The mean over the items and its standard error (sample deviation / sqrt(N); None for a single item).

    >>> score(np.array([0.0, 1.0, 1.0, 0.0])).value
    0.5
    """
    num_items = len(values_N)
    stderr = float(values_N.std(ddof=1)) / math.sqrt(num_items) if num_items > 1 else None
    return Score(value=float(values_N.mean()), stderr=stderr)


def bootstrap_interval(values_N: Floats, seed: int, num_resamples: int = NUM_RESAMPLES) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of `values_N`, the same for the same seed.

    A resample of N items with replacement is a multinomial draw of how often each *distinct* value occurs, so a task
    of 0/1 scores, whose differences are -1, 0 or 1, costs three counts a resample however many items it has. Where all
    values are equal there is nothing to resample and both ends are that value.

    >>> bootstrap_interval(np.array([0.25, 0.25]), seed=0)
    (0.25, 0.25)
    """
    distinct_U, count_U = np.unique(values_N, return_counts=True)
    if len(distinct_U) == 1:
        return float(distinct_U[0]), float(distinct_U[0])
    num_items = len(values_N)
    generator = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // len(distinct_U))
    means: list[Floats] = []
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        count_RU = generator.multinomial(num_items, count_U / num_items, size=size)
        means.append(count_RU @ distinct_U / num_items)
    tail = (1 - CONFIDENCE_FRAC) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def flips(baseline_N: NDArray[Any], compressed_N: NDArray[Any]) -> tuple[int, int] | None:
    """(items wrong before and right after, items right before and wrong after), or None unless all scores are 0 or 1.

    >>> flips(np.array([1, 1, 0]), np.array([0, 1, 1]))
    (1, 1)
    """
    if not (np.isin(baseline_N, (0, 1)).all() and np.isin(compressed_N, (0, 1)).all()):
        return None
    return int((compressed_N > baseline_N).sum()), int((compressed_N < baseline_N).sum())


def mcnemar_p(better: int, worse: int) -> float:
    """McNemar's exact two-sided p: how likely flips this lopsided are if either direction were a coin toss.

    Twice the smaller tail of a Binomial(better + worse, 1/2), at most 1, in exact integers until the one division.

    >>> mcnemar_p(0, 5), mcnemar_p(3, 3), mcnemar_p(0, 0)
    (0.0625, 1.0, 1.0)
    """
    num_flips = better + worse
    ways = tail = 1
    for k in range(min(better, worse)):
        ways = ways * (num_flips - k) // (k + 1)
        tail += ways
    return min(2 * tail, 1 << num_flips) / (1 << num_flips)


def loss_interval(interval: tuple[float, float], higher_is_better: bool) -> tuple[float, float]:
    """An interval of compressed - baseline as an interval of the loss, which is bad when positive.

    >>> loss_interval((-0.03, 0.01), higher_is_better=True)
    (-0.01, 0.03)
    """
    low, high = interval
    return (-high, -low) if higher_is_better else (low, high)


def verdict(loss: tuple[float, float], budget: float) -> Verdict:
    """Pass when the whole interval of the loss is within the budget, fail when all of it is beyond, else inconclusive.

    >>> verdict((-0.01, 0.02), 0.02), verdict((0.01, 0.03), 0.02), verdict((0.021, 0.03), 0.02)
    ('pass', 'inconclusive', 'fail')
    """
    low, high = loss
    if high <= budget:
        return "pass"
    return "fail" if low > budget else "inconclusive"


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of several together: the worst of them.

    >>> overall(["pass", "inconclusive"]), overall(["inconclusive", "fail"]), overall([])
    ('inconclusive', 'fail', 'pass')
    """
    found = set(verdicts)
    return "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"
