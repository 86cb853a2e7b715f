"""GPTQ against the plain reference, and the properties that make it worth running."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.errors import LLMCompressError
from llmcompress.quantize.grid import NF4
from llmcompress.quantize.hessian import accumulate, dampened, relative_error
from llmcompress.quantize.methods import gptq, rtn
from llmcompress.scheme import PRESETS, WeightScheme
from tests.unit.quantize import gptq_reference

SCHEMES = [
    WeightScheme(4, 32),
    WeightScheme(3, 16, symmetric=False),
    WeightScheme(2, 64),
    WeightScheme(8, -1),
    WeightScheme(4, -1, symmetric=False),
    PRESETS["NF4"],
    PRESETS["NF4-DQ"],
]


def layer(rows: int, width: int, seed: int = 0, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs with columns of very different size; weight, Hessian and inputs in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    spread = torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ (mix + torch.eye(width)) * spread
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return weight, x.t() @ x / tokens, x


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label())
@pytest.mark.parametrize("actorder", ["none", "static"])
@pytest.mark.parametrize("block_size", [16, 128, 1000])
def test_codes_equal_the_plain_float64_reference(scheme: WeightScheme, actorder: str, block_size: int) -> None:
    width = 192
    weight, hessian, _ = layer(24, width)
    settings = gptq.GptqSettings(actorder=actorder, block_size=block_size)  # type: ignore[arg-type]
    solved = gptq.ENTRY.solve(weight, hessian, scheme, torch.float32, settings)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable") if actorder == "static" else np.arange(width)
    scale = solved.scale_OG.double().numpy()
    zero = np.zeros_like(scale) if solved.zero_point_OG is None else solved.zero_point_OG.double().numpy()
    damped = dampened(hessian, settings.dampening_frac).numpy()
    table = np.array(NF4, np.float32).astype(np.float64) if scheme.codebook else None
    expected = gptq_reference.solve(
        weight.numpy(), damped, scale, zero, table, scheme.num_codes - 1, order, scheme.group_width(width)
    )
    assert np.array_equal(solved.codes_OI.numpy(), expected)


def test_float32_agrees_with_float64_but_for_a_few_ties() -> None:
    weight, hessian, _ = layer(64, 256, seed=3)
    slow = gptq.ENTRY.solve(weight, hessian, WeightScheme(4, 64), torch.float32, gptq.GptqSettings())
    fast = gptq.ENTRY.solve(weight.float(), hessian.float(), WeightScheme(4, 64), torch.float32, gptq.GptqSettings())
    same = (slow.codes_OI == fast.codes_OI).double().mean().item()
    assert same >= 0.99
    errors = [relative_error(weight.float(), each.dequantize(), hessian.float()) for each in (slow, fast)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_loses_less_output_than_rounding(name: str) -> None:
    weight, hessian, x = layer(48, 256, seed=1)
    scheme = PRESETS[name]
    settings = gptq.GptqSettings()
    ours = gptq.ENTRY.solve(weight.float(), hessian.float(), scheme, torch.float32, settings).dequantize()
    plain = rtn.ENTRY.solve(weight.float(), None, scheme, torch.float32, rtn.RtnSettings()).dequantize()
    lost = [((weight - q.double()) @ x.t()).square().sum().item() for q in (ours, plain)]
    assert lost[0] < 0.8 * lost[1]


def test_the_search_for_scales_helps_and_never_widens_the_weighted_error() -> None:
    weight, _, _ = layer(32, 128, seed=2)
    importance = torch.rand(128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scheme in SCHEMES:
        found = gptq.searched_scales(weight, importance, scheme, torch.float32)
        plain = gptq.plain_scales(weight, scheme, torch.float32)
        before = gptq._group_error(weight, importance, plain, scheme)
        after = gptq._group_error(weight, importance, found, scheme)
        assert bool((after <= before).all())
        assert float(after.sum()) < float(before.sum()) or scheme.num_bits == 8


def test_the_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    _, hessian, _ = layer(1, 96, seed=4)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    torch.testing.assert_close(gptq.inverse_factor(hessian), expected, rtol=1e-8, atol=1e-10)


def test_a_dead_input_column_is_rounded_and_disturbs_nothing() -> None:
    weight, hessian, x = layer(16, 64, seed=5)
    x = x.clone()
    x[:, 10] = 0
    hessian = x.t() @ x / len(x)
    solved = gptq.ENTRY.solve(weight, hessian, WeightScheme(4, 32), torch.float32, gptq.GptqSettings())
    value, step = solved.dequantize(torch.float64)[:, 10], solved.scale_OG[:, 0].double()
    inside = weight[:, 10].abs() < 7 * step
    assert bool(((value - weight[:, 10]).abs()[inside] <= step[inside] / 2 + 1e-9).all())


@pytest.mark.parametrize(
    ("hessian", "said"),
    [
        (torch.zeros(64, 64), "is zero"),
        (torch.full((64, 64), float("nan")), "not finite"),
        (-torch.eye(64) + 2 * torch.ones(64, 64), "singular"),
    ],
)
def test_a_hessian_that_cannot_be_used_is_an_error(hessian: torch.Tensor, said: str) -> None:
    with pytest.raises(LLMCompressError, match=said):
        gptq.ENTRY.solve(torch.randn(8, 64), hessian, WeightScheme(4, 32), torch.float32, gptq.GptqSettings())


def test_rank_deficient_hessians_are_solved_through_dampening() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    hessian, num_tokens = accumulate([x], [None])
    assert num_tokens == 5
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    solved = gptq.ENTRY.solve(weight, hessian, WeightScheme(4, 32), torch.float32, gptq.GptqSettings())
    assert relative_error(weight, solved.dequantize(), hessian) < 0.01


def test_padding_never_enters_a_hessian() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, 16, generator=generator)
    mask = torch.rand(3, 10, generator=generator) > 0.4
    expected = x[mask].double().t() @ x[mask].double() / mask.sum()
    spoiled = torch.where(mask.unsqueeze(-1), x, torch.full_like(x, 1e9))
    hessian, num_tokens = accumulate([spoiled[:1], spoiled[1:]], [mask[:1], mask[1:]])
    assert num_tokens == int(mask.sum())
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-5, atol=1e-6)


def test_relative_error_is_that_of_the_outputs() -> None:
    weight, hessian, x = layer(8, 32, seed=6)
    other = weight + 0.1 * torch.randn(8, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = (((weight - other) @ x.t()).square().sum() / (weight @ x.t()).square().sum()).item()
    assert relative_error(weight, other, hessian.float()) == pytest.approx(expected, rel=1e-4)
