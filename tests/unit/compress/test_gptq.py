"""GPTQ against the plain reference, and the properties that make it worth running."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch

from llmcompress.compress.grid import codebook, nearest_codes, shrunk_scales
from llmcompress.compress.methods import gptq, rtn
from llmcompress.compress.scheme import PRESETS, Scheme
from llmcompress.compress.solvers import codes
from llmcompress.compress.solvers.factor import factorise
from llmcompress.compress.solvers.scale_search import factors, searched_scales
from llmcompress.compress.statistics import Statistics, damping, relative_error
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.errors import LLMCompressError
from tests.grids import NF4, accumulate, weights_only
from tests.unit.compress import gptq_reference

SCHEMES = [
    weights_only(4, 32),
    weights_only(3, 16, symmetric=False),
    weights_only(2, 64),
    weights_only(8, -1),
    weights_only(4, -1, symmetric=False),
    PRESETS["NF4"],
    PRESETS["NF4-DQ"],
]


WIDTH = 192


class SolvedWith(NamedTuple):
    """What decides the reference's codes of the one test layer."""

    scheme: Scheme
    actorder: str
    scale: bytes
    zero: bytes


def layer(rows: int, width: int, seed: int = 0, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated inputs with columns of very different size; weight, Hessian and inputs in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    spread = torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ (mix + torch.eye(width)) * spread
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return weight, x.t() @ x / tokens, x


@cache
def expected_codes(solved: SolvedWith) -> np.ndarray:
    """The reference's codes; slow, so kept for the variants that must give the same."""
    weight, hessian, _ = layer(24, WIDTH)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable") if solved.actorder == "static" else np.arange(WIDTH)
    scale = np.frombuffer(solved.scale, np.float32).astype(np.float64).reshape(24, -1)
    zero = np.frombuffer(solved.zero, np.uint8).astype(np.float64).reshape(24, -1) if solved.zero else scale * 0
    damped = (hessian + damping(hessian, gptq.GptqSettings().dampening_frac) * torch.eye(WIDTH)).numpy()
    table = np.array(NF4, np.float32).astype(np.float64) if solved.scheme.grid.codebook else None
    group = solved.scheme.grid.group_width(WIDTH)
    return gptq_reference.solve(
        weight.numpy(), damped, scale, zero, table, solved.scheme.grid.num_codes - 1, order, group
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label())
@pytest.mark.parametrize("actorder", ["none", "static"])
@pytest.mark.parametrize(("block_size", "compiled"), [(16, True), (128, True), (1000, True), (128, False)])
def test_codes_equal_the_plain_float64_reference(
    scheme: Scheme, actorder: str, block_size: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "compiled", lambda: compiled)
    weight, hessian, _ = layer(24, WIDTH)
    settings = gptq.GptqSettings(actorder=actorder, block_size=block_size)
    solved = gptq.ENTRY.solve(weight, Statistics(hessian), scheme, torch.float32, settings)
    zero = b"" if solved.zero_point_OG is None else solved.zero_point_OG.numpy().tobytes()
    with_ = SolvedWith(scheme, actorder, solved.scale_OG.numpy().tobytes(), zero)
    assert np.array_equal(solved.codes_OI.numpy(), expected_codes(with_))


def test_float32_agrees_with_float64_but_for_a_few_ties() -> None:
    weight, hessian, _ = layer(64, 256, seed=3)
    slow = gptq.ENTRY.solve(weight, Statistics(hessian), weights_only(4, 64), torch.float32, gptq.GptqSettings())
    fast = gptq.ENTRY.solve(
        weight.float(), Statistics(hessian.float()), weights_only(4, 64), torch.float32, gptq.GptqSettings()
    )
    same = (slow.codes_OI == fast.codes_OI).double().mean().item()
    assert same >= 0.99
    errors = [relative_error(weight.float(), each.dequantize(), hessian.float()) for each in (slow, fast)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
def test_loses_less_output_than_rounding(name: str) -> None:
    weight, hessian, x = layer(48, 256, seed=1)
    scheme = PRESETS[name]
    settings = gptq.GptqSettings()
    ours = gptq.ENTRY.solve(weight.float(), Statistics(hessian.float()), scheme, torch.float32, settings).dequantize()
    plain = rtn.ENTRY.solve(weight.float(), None, scheme, torch.float32, rtn.ENTRY.settings()).dequantize()
    lost = [((weight - q.double()) @ x.t()).square().sum().item() for q in (ours, plain)]
    assert lost[0] < 0.8 * lost[1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label())
@pytest.mark.parametrize("compiled", [True, False])
def test_the_search_finds_the_scale_of_least_weighted_error(
    scheme: Scheme, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference tries one factor after the other on the whole weight, with the grid's own rounding."""
    monkeypatch.setattr(codes, "compiled", lambda: compiled)
    weight, _, _ = layer(32, 128, seed=2)
    importance = torch.rand(128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = searched_scales(weight, importance, scheme.grid, torch.float32)
    errors, scales = [], []
    for factor in factors(scheme.grid):
        tried = shrunk_scales(weight, scheme.grid, torch.float32, factor)
        value = QuantizedWeight(
            nearest_codes(weight, tried, scheme.grid),
            tried.scale_OG,
            tried.zero_point_OG,
            codebook(scheme.grid),
            scheme.grid,
        ).dequantize(torch.float64)
        lost = ((weight - value).square() * importance).reshape(32, tried.scale_OG.shape[1], -1).sum(-1)
        errors.append(lost)
        scales.append(tried.scale_OG)
    best = torch.stack(errors).argmin(0, keepdim=True)
    assert torch.equal(found.scale_OG, torch.stack(scales).gather(0, best)[0])
    assert bool((best > 0).any()) or scheme.grid.num_bits == 8, "or the test shows nothing"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_factor_is_that_of_the_inverse_in_the_order_asked_for(dtype: torch.dtype) -> None:
    _, hessian, _ = layer(1, 96, seed=4)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    found = factorise(hessian.to(dtype), order, 0.5)
    damped = (hessian + 0.5 * torch.eye(96))[order][:, order]
    inverse = torch.linalg.inv(found.part(slice(0, 96), slice(0, 96)).double())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    tight = dtype == torch.float64
    torch.testing.assert_close(inverse, expected, rtol=1e-8 if tight else 1e-3, atol=1e-10 if tight else 1e-4)
    importance = found.importance_I[order].double()
    torch.testing.assert_close(importance, expected.diagonal().pow(-2), rtol=1e-8 if tight else 1e-3, atol=0)


def test_blocks_looking_left_are_the_updates_looking_right() -> None:
    """What a block finds when its turn comes is the weight after the textbook's update by every earlier block."""
    weight, hessian, _ = layer(8, 96, seed=6)
    factor = factorise(hessian, torch.arange(96), 0.1)
    inverse = torch.linalg.inv(factor.part(slice(0, 96), slice(0, 96)))
    right, left = weight.clone(), weight.clone()
    for start in range(0, 96, 32):
        block = slice(start, start + 32)
        from_left, own = factor.block(block.start, block.stop)
        torch.testing.assert_close(own, inverse[block, block], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(left[:, block] + left[:, :start] @ from_left, right[:, block], rtol=1e-9, atol=1e-12)
        error = torch.empty(8, 32, dtype=torch.float64)
        for j in range(start, start + 32):
            rounded = right[:, j].round()
            error[:, j - start] = (right[:, j] - rounded) / inverse[j, j]
            right[:, j + 1 : start + 32] -= error[:, j - start, None] * inverse[j, j + 1 : start + 32]
            right[:, j] = rounded
        right[:, start + 32 :] -= error @ inverse[block, start + 32 :]
        left[:, block] -= right[:, block]


def test_a_hessian_that_float32_cannot_factor_is_factored_in_float64() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = (x.t() @ x).float()
    damping = 1e-7 - float(torch.linalg.eigvalsh(hessian.double()).min())
    backwards = (hessian + damping * torch.eye(64)).flip(0, 1)
    assert int(torch.linalg.cholesky_ex(backwards).info) > 0, "or the test shows nothing"
    factor = factorise(hessian, torch.arange(64), damping)
    assert factor.lower_II.dtype == torch.float32
    whole = factor.part(slice(0, 64), slice(0, 64)).double()
    torch.testing.assert_close(whole @ whole.t(), hessian.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [weights_only(4, 32), weights_only(3, 16, symmetric=False), PRESETS["NF4"]])
def test_the_path_without_a_compiler_agrees_in_float32(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, _ = layer(64, 256, seed=8)
    found = []
    for compiled in (True, False):
        monkeypatch.setattr(codes, "compiled", lambda compiled=compiled: compiled)
        solved = gptq.ENTRY.solve(
            weight.float(), Statistics(hessian.float()), scheme, torch.float32, gptq.GptqSettings()
        )
        found.append(solved)
    assert (found[0].codes_OI == found[1].codes_OI).double().mean() >= 0.99
    errors = [relative_error(weight.float(), each.dequantize(), hessian.float()) for each in found]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)


def test_a_dead_input_column_is_rounded_and_disturbs_nothing() -> None:
    weight, hessian, x = layer(16, 64, seed=5)
    x = x.clone()
    x[:, 10] = 0
    hessian = x.t() @ x / len(x)
    solved = gptq.ENTRY.solve(weight, Statistics(hessian), weights_only(4, 32), torch.float32, gptq.GptqSettings())
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
        gptq.ENTRY.solve(
            torch.randn(8, 64), Statistics(hessian), weights_only(4, 32), torch.float32, gptq.GptqSettings()
        )


def test_rank_deficient_hessians_are_solved_through_dampening() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    hessian, num_tokens = accumulate([x], [None])
    assert num_tokens == 5
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    solved = gptq.ENTRY.solve(weight, Statistics(hessian), weights_only(4, 32), torch.float32, gptq.GptqSettings())
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
