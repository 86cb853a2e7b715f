"""Printing never rounds a difference away."""

from __future__ import annotations

import random

import pytest

from llmcompress.report.numerals import fixed, p_value, percent, places, significant, size


@pytest.mark.parametrize("seed", range(50))
def test_different_values_print_differently(seed: int) -> None:
    chance = random.Random(seed)
    values = [round(chance.uniform(-1, 1) * 10.0 ** -chance.randrange(7), 10) for _ in range(4)] + [0.02, -0.02, 0.0]
    digits = places(values)
    printed = {fixed(value, digits) for value in values}
    assert len(printed) == len(set(values))
    assert all(float(fixed(value, digits)) for value in values if value)


def test_the_last_bits_of_floating_point_are_not_a_difference() -> None:
    assert places([0.1 + 0.2, 0.3, 1e-17]) == 4
    assert fixed(-1e-17, 4, sign=True) == "0.0000"


def test_edges() -> None:
    assert percent(0.0) == "0 %"
    assert percent(0.00001) == "0.0010 %"
    assert p_value(1e-300) == "< 0.0001"
    assert p_value(0.0001) == "0.0001"
    assert significant(0.0) == "0"
    assert size(0) == "0 bytes"
    assert size(7_000_000_000) == "7.00 GB"
    assert size(999_499) == "999 kB" and size(999_500) == "1.00 MB" and size(5_000_000_000_000) == "5.00 TB"
