"""Two models on the same items: how large is the difference, how sure is it, and is it within budget?

Both models answer every item, so item i gives a pair (baseline_i, compressed_i) and everything here works on the
differences. Two accuracies of 0.80 +- 0.02 look the same; the paired difference of the same run may be -0.030 with an
interval of [-0.041, -0.019], since the items' own difficulty cancels.

    0/1 metric   better b, worse c of N items      score interval of Tango (1998), or the adjusted Wald interval of
                                                   Bonett and Price (2012): at each end the wider one
    other        N differences                     Student's t, or the bootstrap of t (Efron 1979; Hall 1988): at each
                                                   end the wider one; two differences of the largest size, one each
                                                   way, are added to what was seen
    flips        items that became right, items that became wrong
    McNemar      were those flips a fair coin? exact binomial (McNemar 1947)
    verdict         budget            a loss is good at 0 and bad to the right
                 ------|-------->
               [pass]  |               the whole interval is within the budget
                    [ ? ]              inconclusive: more items would tell
                       |  [fail]       the whole interval is beyond it
    power        items that a verdict at a budget takes

Resampling what was seen cannot give what was not: four items without a flip have a percentile bootstrap of no width.
Both intervals for 0/1 metrics have one (+-0.49 at four items, +-0.019 at 200). Each has a weakness of its own: where
flips are few and all one way, Tango's end next to 0 is too close (5.3% of such runs miss the truth there, in the place
of 2.5%) and Bonett and Price's far end (6.9%). Together neither end misses more than 2.8%, by enumeration; Newcombe's
method 10 (1998) misses up to 15% on the far side. Student's t and the bootstrap of t are to each other what those two
are, when a few rows lost far more than the others. scripts/simulate_intervals measures all of it.

Shapes: N items, R resamples, U distinct differences. Nothing is rounded before it is compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcompress.report import Score, Verdict

Floats = NDArray[np.float64]

NUM_RESAMPLES = 10_000
CONFIDENCE_FRAC = 0.95
COUNTS_AT_ONCE = 4_000_000
"""Entries of the table of resampled counts that is held in memory (8 bytes each)."""
Z = NormalDist().inv_cdf((1 + CONFIDENCE_FRAC) / 2)
EXPECTED_DISCORDANCE = 0.10
"""Share of the items that flip either way, for planning: what 4 bits do to a small model; 3 bits flip more."""
POWER = 0.955
"""How often a verdict comes, of a model that lost nothing (pass) or twice the budget (fail): 95%, and a
little over for what the formula leaves out."""
SCORE_METHOD = "Tango and Bonett-Price, the wider at each end"
MEAN_METHOD = "Student's t and bootstrap of t, the wider at each end"


def score(values_N: Floats) -> Score:
    """The mean over the items and its standard error (sample deviation / sqrt(N); None for a single item).

    >>> score(np.array([0.0, 1.0, 1.0, 0.0])).value
    0.5
    """
    num_items = len(values_N)
    stderr = float(values_N.std(ddof=1)) / math.sqrt(num_items) if num_items > 1 else None
    return Score(value=float(values_N.mean()), stderr=stderr)


def paired_interval(better: Any, worse: Any, num_items: Any) -> tuple[Floats, Floats]:
    """95% interval of the difference of two paired proportions (compressed - baseline), for arrays of any one shape.

    better, worse: items that became right, items that became wrong, of `num_items`. The wider of Tango's score
    interval and that of Bonett and Price at each end, within [-1, 1]; it has width whatever was seen.

    >>> low, high = paired_interval(0, 0, 4)
    >>> round(float(low), 2), round(float(high), 2)
    (-0.49, 0.49)
    """
    better, worse, num_items = (np.asarray(values, dtype=np.float64) for values in (better, worse, num_items))
    score_ends, wald_ends = tango_interval(better, worse, num_items), bonett_price_interval(better, worse, num_items)
    return np.minimum(score_ends[0], wald_ends[0]), np.maximum(score_ends[1], wald_ends[1])


def tango_interval(better: Floats, worse: Floats, num_items: Floats) -> tuple[Floats, Floats]:
    """Tango's score interval: every difference that a test on the observed flips does not refuse.

    The test divides by the standard deviation under the difference that is tested, the chance of the other flips at its
    maximum likelihood there (a root of a quadratic). T. Tango, Statistics in Medicine 17 (1998), 891-908.
    """
    seen = (better - worse) / num_items

    def refused(difference: Floats) -> NDArray[np.bool_]:
        linear = -better - worse + (2 * num_items - better + worse) * difference
        constant = -worse * difference * (1 - difference)
        root = np.sqrt(np.maximum(linear**2 - 8 * num_items * constant, 0))
        worse_share = (root - linear) / (4 * num_items)
        variance = num_items * (2 * worse_share + difference * (1 - difference))
        return (better - worse - num_items * difference) ** 2 > Z**2 * np.maximum(variance, 0) + 1e-12

    ends = []
    for bound in (-1.0, 1.0):
        inside, outside = seen, np.full_like(seen, bound)
        for _ in range(50):
            middle = (inside + outside) / 2
            out = refused(middle)
            inside, outside = np.where(out, inside, middle), np.where(out, middle, outside)
        ends.append((inside + outside) / 2)
    return ends[0], ends[1]


def bonett_price_interval(better: Floats, worse: Floats, num_items: Floats) -> tuple[Floats, Floats]:
    """The Wald interval after one more item of each flip: D. G. Bonett, R. M. Price, J. Educ. Behav. Stat. 37, 2012."""
    better_share, worse_share = (better + 1) / (num_items + 2), (worse + 1) / (num_items + 2)
    difference = better_share - worse_share
    half = Z * np.sqrt((better_share + worse_share - difference**2) / (num_items + 2))
    return np.maximum(difference - half, -1.0), np.minimum(difference + half, 1.0)


def mean_interval(
    values_N: Floats, seed: int, spread: float = 0.0, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """95% interval of the mean of `values_N`, the same for the same seed: the wider of Student's t and the bootstrap of
    t at each end.

    spread: two values this far from the mean, one each way, are added, so that the interval has width where all values
    are equal; 0 where equal values are a fact (two models that give the same logits) and not luck.

    A resample of N items with replacement is a multinomial draw of how often each *distinct* value occurs.

    >>> mean_interval(np.array([0.25, 0.25]), seed=0)
    (0.25, 0.25)
    """
    from scipy.special import stdtrit

    mean, num_items = float(values_N.mean()), len(values_N)
    distinct_U, count_U = np.unique(values_N - mean, return_counts=True)
    if spread == 0 and len(distinct_U) == 1:
        return float(values_N[0]), float(values_N[0])
    total = num_items + (2 if spread else 0)

    def standard_error(sum_R: Any, squares_R: Any) -> Any:
        variance = (squares_R + 2 * spread**2 - sum_R**2 / total) / max(total - 1, 1)
        return np.sqrt(np.maximum(variance, 0) / total)

    error = float(standard_error(distinct_U @ count_U, distinct_U**2 @ count_U))
    generator = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // len(distinct_U))
    ratios: list[Floats] = []
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        count_RU = generator.multinomial(num_items, count_U / num_items, size=size)
        sum_R = count_RU @ distinct_U
        error_R = standard_error(sum_R, count_RU @ distinct_U**2)
        varied = error_R > 1e-9 * error
        ratios.append(sum_R[varied] / total / error_R[varied])
    tail = (1 - CONFIDENCE_FRAC) / 2
    small, large = np.quantile(np.concatenate([*ratios, np.zeros(1)]), [tail, 1 - tail])
    student = float(stdtrit(total - 1, 1 - tail))
    return mean - float(max(large, student)) * error, mean + float(max(-small, student)) * error


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


def items_needed(budget: float, discordance: float = EXPECTED_DISCORDANCE) -> int | None:
    """Items that a verdict takes: at so many, a model that lost nothing passes and one that lost twice the budget
    fails, each in 95% of all samples at least; None for a budget of 0, which no number of items can show.

    discordance: share of the items that flip, either way (at least the loss itself). Both losses lie one budget from
    the budget, and a mean of N differences of -1, 0 and 1 has a variance of at most discordance / N, so

        N = (z_0.975 + z_0.955)^2 discordance / budget^2 + 2 / budget

    the last term for flips coming whole. R. J. Connor, Biometrics 43 (1987), 207-211, without the squared loss.

    >>> items_needed(0.02), items_needed(0.01), items_needed(0.02, discordance=0.2), items_needed(0.0)
    (3441, 13562, 6781, None)
    """
    if budget <= 0:
        return None
    reach = Z + NormalDist().inv_cdf(POWER)
    return math.ceil(reach**2 * max(discordance, 2 * budget) / budget**2 + 2 / budget)


def verdict(loss: tuple[float, float], budget: float, enough: bool = True) -> Verdict:
    """Pass when the whole interval of the loss is within the budget, fail when all of it is beyond, else inconclusive.

    enough: whether there were items enough for a verdict at all; where not it is inconclusive.

    >>> verdict((-0.01, 0.02), 0.02), verdict((0.01, 0.03), 0.02), verdict((0.021, 0.03), 0.02)
    ('pass', 'inconclusive', 'fail')
    """
    low, high = loss
    if not enough or low <= budget < high:
        return "inconclusive"
    return "pass" if high <= budget else "fail"


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of several together: the worst of them.

    >>> overall(["pass", "inconclusive"]), overall(["inconclusive", "fail"]), overall([])
    ('inconclusive', 'fail', 'pass')
    """
    found = set(verdicts)
    return "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"
