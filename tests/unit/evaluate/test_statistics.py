from __future__ import annotations

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest

from llmcompress.evaluate.statistics import (
    bonett_price_interval,
    flips,
    items_needed,
    loss_interval,
    mcnemar_p,
    mean_interval,
    overall,
    paired_interval,
    score,
    tango_interval,
    verdict,
)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (0, 1), (1, 0), (3, 3), (2, 9), (14, 5), (0, 40), (700, 800)])
def test_mcnemar_is_the_exact_binomial_test(better: int, worse: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert mcnemar_p(better, worse) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_enumeration_of_all_coin_tosses() -> None:
    better, worse = 2, 6
    tosses = [sum(faces) for faces in product((0, 1), repeat=better + worse)]
    as_lopsided = [heads for heads in tosses if abs(heads - 4) >= abs(better - 4)]
    assert mcnemar_p(better, worse) == len(as_lopsided) / len(tosses)


def test_mcnemar_of_very_many_flips_does_not_underflow_or_overflow() -> None:
    assert mcnemar_p(3000, 3000) == 1.0
    assert 0 <= mcnemar_p(0, 5000) < 1e-300


@pytest.mark.parametrize(
    ("better", "worse", "num_items"), [(0, 0, 4), (0, 3, 30), (5, 12, 200), (40, 41, 900), (7, 7, 7 * 2)]
)
def test_tango_is_the_inverted_score_test_with_a_likelihood_maximized_by_search(
    better: int, worse: int, num_items: int
) -> None:
    optimize = pytest.importorskip("scipy.optimize")

    def statistic(difference: float) -> float:
        """(b - c - n d) / its standard deviation, with the nuisance share at its maximum likelihood under d."""
        least, most = max(0.0, -difference), (1 - difference) / 2

        def minus_log_likelihood(share: float) -> float:
            counts = (better, worse, num_items - better - worse)
            shares = (share + difference, share, 1 - 2 * share - difference)
            return -sum(n * np.log(max(p, 1e-300)) for n, p in zip(counts, shares, strict=True) if n)

        share = optimize.minimize_scalar(
            minus_log_likelihood, bounds=(least, most), options={"xatol": 1e-12}, method="bounded"
        ).x
        return (better - worse - num_items * difference) / sqrt(num_items * (2 * share + difference - difference**2))

    seen = (better - worse) / num_items
    low = optimize.brentq(lambda d: statistic(d) - 1.959964, -1 + 1e-9, seen - 1e-7)
    high = optimize.brentq(lambda d: statistic(d) + 1.959964, seen + 1e-7, 1 - 1e-9)
    found = tango_interval(*(np.array(float(n)) for n in (better, worse, num_items)))
    assert [float(end) for end in found] == pytest.approx([low, high], abs=2e-5)


def test_bonett_and_price_by_their_formula() -> None:
    p12, p21, n = (12 + 1) / 202, (5 + 1) / 202, 202
    half = 1.959964 * sqrt((p12 + p21 - (p12 - p21) ** 2) / n)
    found = bonett_price_interval(*(np.array(float(n)) for n in (12, 5, 200)))
    assert [float(end) for end in found] == pytest.approx([p12 - p21 - half, p12 - p21 + half], rel=1e-6)


def test_the_paired_interval_has_width_contains_what_was_seen_and_knows_no_direction() -> None:
    for num_items in (1, 4, 50, 3000):
        for better, worse in product(range(0, num_items + 1, max(1, num_items // 5)), repeat=2):
            if better + worse <= num_items:
                low, high = (float(end) for end in paired_interval(better, worse, num_items))
                assert -1 <= low < high <= 1
                assert low <= (better - worse) / num_items <= high
                assert tuple(float(end) for end in paired_interval(worse, better, num_items)) == pytest.approx(
                    (-high, -low)
                )
    widths = [float(np.diff(paired_interval(0, 0, n))[0]) for n in (4, 50, 200, 2000)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 0.9 and widths[2] < 0.04


@pytest.mark.parametrize("num_items", [8, 13, 50, 64])
@pytest.mark.parametrize("discordance", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("one_way", [0.0, 0.2, 0.5])
def test_coverage_by_enumeration_of_every_outcome(num_items: int, discordance: float, one_way: float) -> None:
    """Every (better, worse) with its multinomial probability: the truth lies outside an end in at most 3% of samples."""
    up, down = discordance * one_way, discordance * (1 - one_way)
    outcomes = [(b, c) for b in range(num_items + 1) for c in range(num_items + 1 - b)]
    chances = np.array(
        [
            comb(num_items, b) * comb(num_items - b, c) * up**b * down**c * (1 - discordance) ** (num_items - b - c)
            for b, c in outcomes
        ]
    )
    assert chances.sum() == pytest.approx(1)
    low, high = paired_interval(*np.array(outcomes).T, num_items)
    below, above = chances[low > up - down + 1e-12].sum(), chances[high < up - down - 1e-12].sum()
    assert max(below, above) <= 0.03 and below + above <= 0.06


@pytest.mark.parametrize("budget", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("discordance", [0.1, 0.25])
def test_at_the_items_that_power_names_a_verdict_comes_in_95_percent(budget: float, discordance: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    num_items = items_needed(budget, discordance)
    assert num_items is not None
    flipped = np.arange(*stats.binom.ppf([1e-6, 1 - 1e-6], num_items, discordance).astype(int))
    flipped = flipped[:: max(1, len(flipped) // 40)]
    worse = np.concatenate([np.arange(total + 1)[:: max(1, total // 400)] for total in flipped])
    total = np.concatenate([np.full(len(range(0, n + 1, max(1, n // 400))), n) for n in flipped])
    low, high = paired_interval(total - worse, worse, num_items)
    verdicts = np.array([verdict((-b, -a), budget) for a, b in zip(low, high, strict=True)])
    for loss, wanted in ((2 * budget, "fail"), (0.0, "pass"), (budget, None)):
        chances = stats.binom.pmf(worse, total, (discordance + loss) / 2 / discordance)
        chances *= stats.binom.pmf(total, num_items, discordance)
        found = {name: chances[verdicts == name].sum() / chances.sum() for name in ("pass", "fail")}
        if wanted is None:
            assert found["pass"] <= 0.03 and found["fail"] <= 0.03
        else:
            assert found[wanted] >= 0.95


def test_no_number_of_items_proves_a_budget_of_zero() -> None:
    assert items_needed(0.0) is None
    assert items_needed(0.2, discordance=0.1) == items_needed(0.2, discordance=0.4)  # a loss is discordance too


def test_the_interval_of_a_mean_is_never_narrower_than_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for values in (np.random.default_rng(3).gamma(2.0, size=60), np.random.default_rng(4).normal(size=20)):
        low, high = mean_interval(values, seed=0)
        expected = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
        assert low <= expected[0] + 1e-9 and high >= expected[1] - 1e-9
        assert high - low < 1.4 * (expected[1] - expected[0])


def test_the_far_end_of_skewed_values_is_that_of_the_bootstrap_of_t_by_resampling_the_values_themselves() -> None:
    values = np.random.default_rng(3).lognormal(size=40)
    generator = np.random.default_rng(1)
    drawn = values[generator.integers(0, 40, (20_000, 40))]
    error = values.std(ddof=1) / sqrt(40)
    ratios = (drawn.mean(1) - values.mean()) / (drawn.std(1, ddof=1) / sqrt(40))
    assert mean_interval(values, seed=0)[1] == pytest.approx(
        values.mean() - np.quantile(ratios, 0.025) * error, rel=0.03
    )


def test_skewed_rows_are_covered_about_as_often_as_the_interval_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = mean_interval(generator.lognormal(0, 0.5, size=20), 0, num_resamples=1000)
        hits += low <= np.exp(0.125) <= high
    assert 278 <= hits <= 298


def test_equal_values_have_width_only_where_luck_could_have_made_them_equal() -> None:
    assert mean_interval(np.zeros(30), seed=0) == (0.0, 0.0)
    low, high = mean_interval(np.zeros(30), seed=0, spread=1.0)
    assert low == -high and 0.08 < high < 0.1  # Student's t of 32 values, one 1 and one -1
    assert mean_interval(np.array([0.25]), seed=0) == (0.25, 0.25)


def test_the_interval_of_a_mean_is_seeded_and_does_not_depend_on_the_order_of_items() -> None:
    values = np.random.default_rng(0).lognormal(size=50)
    first = mean_interval(values, seed=4)
    assert first == pytest.approx(mean_interval(values[::-1].copy(), seed=4), rel=1e-12)
    assert first == mean_interval(values, seed=4)
    assert first != mean_interval(values, seed=5)


def test_resampling_in_pieces_is_as_wide_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).lognormal(size=50)
    whole = mean_interval(values, seed=4)
    monkeypatch.setattr("llmcompress.evaluate.statistics.COUNTS_AT_ONCE", 50 * 37)
    assert mean_interval(values, seed=4) == pytest.approx(whole, abs=0.05)


def test_two_very_different_values_give_a_finite_interval() -> None:
    assert all(np.isfinite(mean_interval(np.array([0.0, 1e6]), seed=0)))


def test_score_is_the_mean_and_its_standard_error() -> None:
    result = score(np.array([1.0, 0.0, 0.0, 1.0, 1.0]))
    assert result.value == 0.6
    assert result.stderr == pytest.approx(sqrt(0.6 * 0.4 / 4))
    assert score(np.array([0.5])).stderr is None


def test_flips_only_where_every_score_is_zero_or_one() -> None:
    assert flips(np.array([0, 1, 1, 1, 0]), np.array([1, 0, 0, 1, 0])) == (1, 2)
    assert flips(np.array([0.5, 1.0]), np.array([1.0, 1.0])) is None


@pytest.mark.parametrize(
    ("interval", "higher_is_better", "budget", "expected"),
    [
        ((-0.02, 0.01), True, 0.02, "pass"),  # at the budget exactly
        ((-0.02 - 1e-12, 0.01), True, 0.02, "inconclusive"),  # and never rounded
        ((-0.05, -0.02), True, 0.02, "inconclusive"),  # the interval's good end lies on the budget
        ((-0.05, -0.02 - 1e-12), True, 0.02, "fail"),
        ((0.01, 0.03), True, 0.0, "pass"),  # a gain
        ((0.0, 0.0), True, 0.0, "pass"),
        ((0.01, 0.03), False, 0.0, "fail"),  # lower is better: a gain of the figure is a loss
        ((-0.03, 0.0), False, 0.0, "pass"),
    ],
)
def test_verdict_edges(interval: tuple[float, float], higher_is_better: bool, budget: float, expected: str) -> None:
    assert verdict(loss_interval(interval, higher_is_better), budget) == expected


def test_the_overall_verdict_is_the_worst() -> None:
    assert overall(["pass", "pass"]) == "pass"
    assert overall(["pass", "inconclusive", "pass"]) == "inconclusive"
    assert overall(["fail", "inconclusive"]) == "fail"


def test_too_few_items_are_inconclusive_whatever_the_interval() -> None:
    for loss in ((-0.5, -0.4), (0.0, 0.5), (0.4, 0.5)):
        assert verdict(loss, 0.02, enough=False) == "inconclusive"
