"""Weights trained on their grid: the codes of the file at the start, a gradient, and codes again at the end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmcompress.compress.methods.base import METHODS
from llmcompress.compress.scheme import preset
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.distill import quantized as quantized_module

GRIDS = [
    preset("W3A16", group_size=32),
    preset("W4A16", group_size=32, symmetric=False),
    preset("NF4"),
    preset("NF4-DQ"),
]


def quantized(scheme: object, seed: int = 0) -> tuple[torch.Tensor, QuantizedWeight]:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)) * 0.1
    method = METHODS.get("rtn")
    return weight, method.solve(weight, None, scheme, torch.float32, method.settings())  # type: ignore[arg-type]


def linear(weight: torch.Tensor) -> nn.Linear:
    one = nn.Linear(64, 24, bias=False)
    with torch.no_grad():
        one.weight.copy_(weight)
    return one


@pytest.mark.parametrize("scheme", GRIDS, ids=lambda scheme: scheme.label())
@pytest.mark.parametrize("with_original", [True, False])
def test_training_begins_with_the_weight_of_the_file(scheme: object, with_original: bool) -> None:
    weight, small = quantized(scheme)
    one = linear(small.dequantize())
    grid = quantized_module.put_on_grid(
        one, small, weight if with_original else None, 4, torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(one.weight, small.dequantize(), rtol=0, atol=1e-7)
    assert torch.equal(quantized_module.trained_codes(one, grid), small.codes_OI)
    assert {name for name, p in one.named_parameters() if p.requires_grad} == {
        "parametrizations.weight.0.first_RI",
        "parametrizations.weight.0.second_OR",
    }


@pytest.mark.parametrize("scheme", GRIDS, ids=lambda scheme: scheme.label())
def test_what_is_written_is_what_was_trained(scheme: object) -> None:
    """Towards another weight's outputs: the loss falls, codes flip, and their dequantization is the trained weight."""
    weight, small = quantized(scheme)
    target = (
        weight
        + torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
        @ torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
        * 0.05
    )
    one = linear(small.dequantize())
    grid = quantized_module.put_on_grid(one, small, weight, 4, torch.Generator().manual_seed(0))
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam([p for p in one.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(150):
        loss = (one(x) - x @ target.t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss))
    codes = quantized_module.trained_codes(one, grid)
    assert history[-1] < 0.7 * history[0]
    assert bool((codes != small.codes_OI).any())
    written = quantized_module.with_codes(small, codes).dequantize()
    torch.testing.assert_close(one.weight, written, rtol=0, atol=1e-6)
    assert torch.equal(quantized_module.with_codes(small, codes).scale_OG, small.scale_OG)


def test_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    weight, small = quantized(GRIDS[0])
    one = Conv1D(24, 64)
    grid = quantized_module.put_on_grid(one, small, weight, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.weight, small.dequantize().t(), rtol=0, atol=1e-7)
    assert torch.equal(quantized_module.trained_codes(one, grid), small.codes_OI)
