"""Asymmetric calibration against least squares and token-by-token sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.compress.methods import gptq
from llmcompress.compress.selection import asymmetric_target, best, candidates, held_out_errors
from llmcompress.compress.statistics import Statistics, StatisticsSums, dampened
from tests.grids import weights_only

ROWS, WIDTH, T = 12, 32, 1600


def drawn(shift: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, what is read, and what the original reads: off by a part that x tells, and one that it does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    told = x @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    original = x + shift * (told + 0.3 * torch.randn(T, WIDTH, generator=generator))
    return torch.randn(ROWS, WIDTH, generator=generator), x, original


def seen_of(x: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None) -> Statistics:
    sums = StatisticsSums(WIDTH, torch.device("cpu"), frozenset({"hessian", "shift"}))
    for part in range(0, T, 400):
        rows = slice(part, part + 400)
        sums.add(x[rows], None if mask is None else mask[rows], original[rows])
    return sums.means()


def held_out(mask: torch.Tensor | None = None) -> torch.Tensor:
    """The tokens that no solver sees: the last sixteenth of each batch of 400."""
    held = torch.arange(T) % 400 >= 375
    return held if mask is None else held & mask


@pytest.mark.parametrize("padded", [False, True])
def test_the_aim_is_the_solution_of_the_damped_least_squares(padded: bool) -> None:
    weight, x, original = drawn(0.2)
    mask = torch.rand(T, generator=torch.Generator().manual_seed(1)) > 0.3 if padded else None
    seen = seen_of(x, original, mask)
    assert seen.shifts is not None
    damped = dampened(seen.hessian_II, 0.05)
    found = asymmetric_target(weight, seen.shifts.solve_II, damped)
    solved = ~held_out() if mask is None else ~held_out() & mask
    x_TI, goal_TO = x[solved].double(), original[solved].double() @ weight.double().t()
    ridge = float((damped - seen.hessian_II).diagonal().mean()) * len(x_TI)
    rows = torch.cat([x_TI, ridge**0.5 * torch.eye(WIDTH, dtype=torch.float64)])  # ||A x - goal||^2 + ridge ||A - W||^2
    goals = torch.cat([goal_TO, ridge**0.5 * weight.double().t()])
    expected = np.linalg.lstsq(rows.numpy(), goals.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_the_error_is_that_of_the_originals_output_token_by_token(padded: bool) -> None:
    weight, x, original = drawn(0.1)
    mask = torch.rand(T, generator=torch.Generator().manual_seed(2)) > 0.3 if padded else None
    seen, held = seen_of(x, original, mask), held_out(mask)
    quantized = (weight * 4).round() / 4
    lost = x[held].double() @ quantized.double().t() - original[held].double() @ weight.double().t()
    whole = x[held].double() @ weight.double().t()
    expected = float(lost.square().sum() / whole.square().sum())
    assert held_out_errors(weight, [quantized], seen)[0] == pytest.approx(expected, rel=1e-4)


def test_where_the_original_reads_the_same_the_aim_is_the_weight() -> None:
    weight, x, _ = drawn(0.0)
    seen = seen_of(x, x)
    assert seen.shifts is not None
    assert torch.equal(asymmetric_target(weight, seen.shifts.solve_II, dampened(seen.hessian_II, 0.05)), weight)


@pytest.mark.parametrize(("shift", "version"), [(0.2, "asymmetric"), (0.0, "refined")])
def test_it_is_kept_where_it_is_nearer_to_the_original(shift: float, version: str) -> None:
    weight, x, original = drawn(shift)
    seen = seen_of(x, original)
    settings, scheme = gptq.GptqSettings(), weights_only(4, 32)
    versions = candidates(
        weight, lambda goal: gptq.ENTRY.solve(goal, seen, scheme, torch.float32, settings), seen, 0.05,
        torch.float32, num_sweeps=4,
    )  # fmt: skip
    kept = best(weight, versions, seen)
    assert kept.version == version
    errors = held_out_errors(weight, [one.dequantize() for one in versions], seen)
    assert kept.held_out_error == min(errors) and kept.plain_held_out_error == errors[0]


def test_without_held_out_tokens_there_is_no_error_to_judge_by() -> None:
    weight, x, _ = drawn(0.0)
    with pytest.raises(ValueError, match="no tokens were held out"):
        held_out_errors(weight, [weight], Statistics(x.t() @ x, None, T))
