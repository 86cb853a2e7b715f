from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import pytest

from llmcompress.evaluate.statistics import bootstrap_interval, flips, loss_interval, mcnemar_p, overall, score, verdict


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


def test_bootstrap_equals_resampling_the_items_themselves() -> None:
    differences = np.array([-1.0] * 14 + [1.0] * 4 + [0.0] * 82)
    generator = np.random.default_rng(1)
    means = differences[generator.integers(0, 100, (40_000, 100))].mean(axis=1)
    low, high = bootstrap_interval(differences, seed=0)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.011)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.011)


def test_bootstrap_of_continuous_values_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).gamma(2.0, size=60)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=5).confidence_interval
    low, high = bootstrap_interval(values, seed=0)
    width = expected.high - expected.low
    assert abs(low - expected.low) < 0.05 * width
    assert abs(high - expected.high) < 0.05 * width


def test_bootstrap_contains_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        low, high = bootstrap_interval(generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=200), 0, 1000)
        hits += low <= 0 <= high
    assert 270 <= hits <= 298


def test_bootstrap_is_seeded_and_does_not_depend_on_the_order_of_items() -> None:
    values = np.random.default_rng(0).normal(size=50)
    first = bootstrap_interval(values, seed=4)
    assert first == bootstrap_interval(values[::-1].copy(), seed=4)
    assert first != bootstrap_interval(values, seed=5)


def test_bootstrap_in_pieces_is_as_wide_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_interval(values, seed=4)
    monkeypatch.setattr("llmcompress.evaluate.statistics.COUNTS_AT_ONCE", 50 * 37)
    assert bootstrap_interval(values, seed=4) == pytest.approx(whole, abs=0.02)


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
