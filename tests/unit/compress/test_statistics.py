"""The Hessian against its definition, summed token by token in float64."""

from __future__ import annotations

import pytest
import torch

from llmcompress.compress.statistics import HessianSum, energy
from tests.grids import accumulate


@pytest.mark.parametrize("width", [1, 7, 64, 130])
def test_it_is_the_mean_of_the_outer_products(width: int) -> None:
    batches = [torch.randn(2, 9, width, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found, count = accumulate(batches, [None] * 3)
    tokens = torch.cat([x.reshape(-1, width) for x in batches]).double()
    expected = sum(torch.outer(x, x) for x in tokens) / len(tokens)
    assert count == 54
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, found.t()), "symmetric to the bit"


def test_padding_counts_for_nothing() -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    spoiled = x.clone()
    spoiled[~mask] = 1e6
    found, count = accumulate([spoiled], [mask])
    expected, _ = accumulate([x[mask]], [None])
    assert count == 7 and torch.equal(found, expected)


def test_without_a_token_it_is_zero() -> None:
    found, count = HessianSum(8, torch.device("cpu")).mean()
    assert count == 0 and not found.any()


@pytest.mark.parametrize(("rows", "width"), [(3, 1), (5, 7), (2050, 64), (9, 130)])
def test_energy_is_the_trace_of_the_whole_product(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    root = torch.randn(width, width, generator=generator, dtype=torch.float64)
    hessian = root @ root.t()
    assert energy(weight, hessian) == pytest.approx(float(torch.trace(weight @ hessian @ weight.t())), rel=1e-12)
    assert energy(weight, None) == pytest.approx(float(weight.square().sum()), rel=1e-12)
