"""Refinement only ever lowers the error, ends where no single move helps, and agrees with a plain float64 sweep."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from llmcompress.compress.grid import snap
from llmcompress.compress.methods import gptq, rtn
from llmcompress.compress.nested_scales import unnest
from llmcompress.compress.scheme import Scheme
from llmcompress.compress.selection import Choice, best, candidates
from llmcompress.compress.solvers import codes as codes_module
from llmcompress.compress.solvers.refine import refine
from llmcompress.compress.statistics import Statistics, dampened, relative_error
from llmcompress.compress.weight import QuantizedWeight
from tests.grids import NF4, accumulate, statistics_of, weights_only
from tests.unit.compress.test_gptq import SCHEMES, layer

every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label())


def rounded(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    return rtn.ENTRY.solve(weight, None, scheme, torch.float32, rtn.ENTRY.settings())


def cost(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> torch.Tensor:
    error = weight.double() - quantized.dequantize().double()
    return ((error @ hessian.double()) * error).sum(1)


@every_scheme
def test_no_row_gets_worse_in_any_sweep(scheme: Scheme) -> None:
    weight, hessian, _ = layer(32, 192, seed=11)
    now = gptq.ENTRY.solve(weight, Statistics(hessian), scheme, torch.float32, gptq.GptqSettings())
    before = cost(weight, now, hessian)
    for _ in range(3):
        now = refine(weight, now, hessian, torch.float32, num_sweeps=1)
        after = cost(weight, now, hessian)
        assert bool((after <= before * (1 + 1e-6)).all())
        before = after
    start = gptq.ENTRY.solve(weight, Statistics(hessian), scheme, torch.float32, gptq.GptqSettings())
    assert float(before.sum()) < float(cost(weight, start, hessian).sum())


@every_scheme
def test_the_result_is_a_weight_that_a_file_can_hold(scheme: Scheme) -> None:
    weight, hessian, _ = layer(16, 192, seed=12)
    start = rounded(weight, scheme)
    kept = (start.codes_OI.clone(), start.scale_OG.clone())
    found = refine(weight, start, hessian, torch.bfloat16, num_sweeps=3)
    assert torch.equal(start.codes_OI, kept[0]) and torch.equal(start.scale_OG, kept[1]), "inputs are left alone"
    assert int(found.codes_OI.max()) < scheme.grid.num_codes and bool((found.scale_OG > 0).all())
    if scheme.grid.codebook is None:
        assert torch.equal(found.scale_OG, found.scale_OG.half().float())
        assert torch.equal(found.scale_OG, found.scale_OG.bfloat16().float())
    if found.nested is not None:
        assert torch.equal(found.scale_OG, unnest(found.nested, 16))
        assert start.nested is not None and torch.equal(found.nested.absmax, start.nested.absmax)


def plain_sweep(
    weight: torch.Tensor, start: QuantizedWeight, hessian: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values after the first `groups` groups, one number at a time: codes in turn, then their scale."""
    codes, value = start.codes_OI.clone(), start.dequantize().double()
    width = weight.shape[1] // start.scale_OG.shape[1]
    for o in range(len(weight)):
        for g in range(groups):
            scale, part = start.scale_OG[o, g].double(), slice(g * width, (g + 1) * width)
            zero = None if start.zero_point_OG is None else start.zero_point_OG[o, g].double()
            levels = torch.arange(start.grid.num_codes).double() - zero if zero is not None else torch.tensor(NF4)
            for j in range(part.start, part.stop):
                wanted = value[o, j] + ((weight[o] - value[o]) @ hessian[:, j]) / hessian[j, j]
                code = int((levels * scale - wanted).abs().argmin())
                codes[o, j], value[o, j] = code, levels[code] * scale
            unit = levels[codes[o, part].long()].double()
            slope, curve = ((weight[o] - value[o]) @ hessian[:, part]) @ unit, unit @ hessian[part, part] @ unit
            found = snap((scale + slope / curve).float(), start.grid, torch.float32).double()
            step = found - scale
            value[o, part] = unit * (found if step * (curve * step - 2 * slope) < 0 else scale)
    return codes, value


@every_scheme
@pytest.mark.parametrize("compiled", [True, False])
def test_one_sweep_equals_a_plain_float64_one(scheme: Scheme, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes_module, "compiled", lambda: compiled)
    weight, hessian, _ = layer(6, 192, seed=13)
    start = rounded(weight, scheme)
    groups = 1 if scheme.grid.double_quant else start.scale_OG.shape[1]  # the plain sweep keeps no 8-bit scales
    seen = groups * scheme.grid.group_width(192)
    codes, value = plain_sweep(weight, start, hessian, groups)
    found = refine(weight, start, hessian, torch.float32, num_sweeps=1)
    assert (found.codes_OI[:, :seen] == codes[:, :seen]).double().mean() > 0.999, "but for exact ties"
    if not scheme.grid.double_quant:
        torch.testing.assert_close(found.dequantize().double(), value, rtol=1e-6, atol=1e-6)


def test_torch_takes_as_many_threads_after_the_compiled_loops_as_before() -> None:
    """numba's own threads are OpenMP's too: told of two, it would have made every later product use two."""
    program = (
        "import torch\nfrom llmcompress.compress.methods import rtn\nfrom llmcompress.compress.solvers.refine import refine\n"
        "from llmcompress.compress.scheme import Scheme, WeightGrid\nw = torch.randn(256, 256)\n"
        "q = rtn.ENTRY.solve(w, None, Scheme(WeightGrid(4, 64)), torch.float32, rtn.ENTRY.settings())\n"
        "refine(w, q, torch.eye(256), torch.float32, 1)\nprint(torch.get_num_threads())"
    )
    for threads in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )  # fmt: skip
        assert done.stdout.strip() == threads


def test_where_it_ends_no_single_code_can_be_improved() -> None:
    weight, hessian, _ = layer(4, 64, seed=14)
    found = refine(weight, rounded(weight, weights_only(3, 32)), hessian, torch.float32, num_sweeps=200)
    best = cost(weight, found, hessian)
    for j in range(0, 64, 7):
        for code in range(8):
            codes = found.codes_OI.clone()
            codes[:, j] = code
            assert bool((cost(weight, replace(found, codes_OI=codes), hessian) >= best * (1 - 1e-9)).all())


def test_the_scale_found_is_the_least_squares_one() -> None:
    weight, hessian, _ = layer(5, 64, seed=15)
    scheme = weights_only(8, -1)
    start = rounded(weight, scheme)
    start = replace(start, scale_OG=start.scale_OG * 1.02)
    found = refine(weight, start, hessian, torch.float32, num_sweeps=1)
    unit = found.codes_OI.double() - 128
    ideal = ((unit @ hessian) * weight).sum(1) / ((unit @ hessian) * unit).sum(1)
    torch.testing.assert_close(found.scale_OG[:, 0].double(), ideal, rtol=1e-3, atol=0)


def test_held_out_tokens_are_the_last_sixteenth_and_no_padding() -> None:
    x = torch.randn(32, 10, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(32, 10, generator=torch.Generator().manual_seed(1)) > 0.3
    seen = statistics_of([x[:16], x[16:]], [mask[:16], mask[16:]])
    held = [15, 31]
    solved = [row for row in range(32) if row not in held]
    for found, rows in ((seen.hessian_II, solved), (seen.held_out_II, held)):
        expected, _ = accumulate([x[rows]], [mask[rows]])
        assert found is not None
        torch.testing.assert_close(found, expected)
    assert seen.num_tokens == int(mask.sum())
    assert statistics_of([x[0, :9]], [None]).held_out_II is None, "nine tokens spare none"


def chosen(weight: torch.Tensor, plain: QuantizedWeight, seen: Statistics, frac: float, num_sweeps: int) -> Choice:
    return best(weight, candidates(weight, lambda _: plain, seen, frac, torch.float32, num_sweeps), seen)


def test_a_refinement_that_overfits_is_not_kept() -> None:
    """Solved on five tokens only, refinement fits those and loses elsewhere: the plain solution stays."""
    weight, hessian, x = layer(24, 64, seed=16)
    few = (x[:5].t() @ x[:5] / 5).float()
    plain = gptq.ENTRY.solve(
        weight.float(), Statistics(hessian.float()), weights_only(3, 32), torch.float32, gptq.GptqSettings()
    )
    seen = Statistics(few, hessian.float(), 5)
    kept = chosen(weight.float(), plain, seen, 1e-4, num_sweeps=4)
    assert kept.weight is plain and kept.version == "plain" and kept.held_out_error == kept.plain_held_out_error


def test_a_refinement_that_helps_is_kept_with_both_errors() -> None:
    weight, _, x = layer(24, 64, seed=17, tokens=4000)
    parts = [(part.t() @ part / len(part)).float() for part in (x[:3700], x[3700:])]
    plain = gptq.ENTRY.solve(
        weight.float(), Statistics(parts[0]), weights_only(3, 32), torch.float32, gptq.GptqSettings()
    )
    kept = chosen(weight.float(), plain, Statistics(parts[0], parts[1], 4000), 0.05, num_sweeps=4)
    assert kept.version == "refined"
    assert kept.held_out_error is not None and kept.plain_held_out_error is not None
    assert kept.held_out_error < kept.plain_held_out_error
    assert kept.held_out_error == pytest.approx(relative_error(weight.float(), kept.weight.dequantize(), parts[1]))


def test_nothing_is_tried_without_held_out_tokens_or_sweeps() -> None:
    weight, hessian, _ = layer(8, 64, seed=18)
    plain = rounded(weight.float(), weights_only(4, 32))
    for seen, sweeps in (
        (Statistics(hessian.float(), None, 9), 4),
        (Statistics(hessian.float(), hessian.float(), 9), 0),
    ):
        kept = chosen(weight.float(), plain, seen, 0.05, sweeps)
        assert kept.weight is plain and kept.held_out_error is None
    assert torch.equal(dampened(hessian, 0.1).diagonal(), hessian.diagonal() + 0.1 * hessian.diagonal().mean())
