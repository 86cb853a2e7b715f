"""What is tried beside a method's own solution is kept only where it lowers the error on tokens nobody solved on.

    W, H ──> method ──> plain ──> refine ──> refined         and, where the original model ran beside,
    A, H ──> method ──> ...   ──> refine ──> aimed           A, the asymmetric target, in place of W
                          │         │          │
                          └─ error on tokens held out: the least of all ─┘

So an option can cost time and never quality: the error that a linear ends with is at most that of the plain method, on
rows that none of them has seen. Both errors are in the report, and which version was kept.

**Asymmetric calibration**: a linear is asked for the original's output although it reads what earlier layers spoiled.
GPTQ asks for W x of the input x that the quantized layers before produce. The original model gives W (x + d), d being
how far its input is from that one. Over the tokens

    ||Q x - W (x + d)||^2  =  ||(Q - A) x||^2 + what no Q changes,      A = W + W E[d x^T] E[x x^T]^-1

so the same solver on the same Hessian, with A as its target instead of W, also makes up for the layers before, as far
as d can be told from x (GPTAQ, Li et al. 2025, section 3; Qronos, Zhang et al. 2025, in the same form). What of d is
particular to the calibration text is fitted too, so the Hessian is damped here as in the solver.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llmcompress.compress.solvers.refine import refine
from llmcompress.compress.statistics import Statistics, dampened, energy
from llmcompress.compress.weight import CompressedWeight, QuantizedWeight

Version = Literal["plain", "refined", "asymmetric"]
VERSIONS: tuple[Version, ...] = ("plain", "refined", "asymmetric")
"""What `candidates` gives, in its order, as the report calls them."""

Solve = Callable[[torch.Tensor], CompressedWeight]
"""A method's solution for a target [O, I]."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The weight that is kept, which version it is, and errors on held-out tokens: its own, and the plain method's.

    The errors are None where nothing was tried.
    """

    weight: CompressedWeight
    version: Version = "plain"
    held_out_error: float | None = None
    plain_held_out_error: float | None = None


def candidates(
    weight_OI: torch.Tensor, solve: Solve, seen: Statistics, dampening_frac: float, scale_dtype: torch.dtype,
    num_sweeps: int,
) -> list[CompressedWeight]:  # fmt: skip
    """The plain solution, then what was made of it, as `VERSIONS` calls them. Rows are independent.

    weight_OI: float32 [O, I]. dampening_frac: of H, in `num_sweeps` sweeps of refinement and in the asymmetric target.
    The plain one stands alone without held-out tokens, where there is nothing to try, and where it is not codes on a
    grid, which is what refinement moves.
    """
    plain = solve(weight_OI)
    if seen.held_out_II is None or (num_sweeps == 0 and seen.shifts is None) or not isinstance(plain, QuantizedWeight):
        return [plain]
    damped_II = dampened(seen.hessian_II, dampening_frac).cpu()
    versions: list[CompressedWeight] = [plain, refine(weight_OI, plain, damped_II, scale_dtype, num_sweeps)]
    if seen.shifts:
        target_OI = asymmetric_target(weight_OI, seen.shifts.solve_II.cpu(), damped_II)
        start = solve(target_OI)
        assert isinstance(start, QuantizedWeight)
        versions.append(refine(target_OI, start, damped_II, scale_dtype, num_sweeps))
    return versions


def asymmetric_target(weight_OI: torch.Tensor, shift_II: torch.Tensor, damped_II: torch.Tensor) -> torch.Tensor:
    """A of the module's docstring, [O, I], in the dtype of `weight_OI`.

    shift_II: mean of d x^T. damped_II: mean of x x^T, damped, so that it has a Cholesky factor.
    """
    factor_II = torch.linalg.cholesky(damped_II)
    return weight_OI + torch.cholesky_solve((weight_OI @ shift_II).t(), factor_II).t()


def best(weight_OI: torch.Tensor, versions: Sequence[CompressedWeight], seen: Statistics) -> Choice:
    """The version of least error on the held-out tokens; the earlier of two that are equal."""
    if len(versions) == 1 or seen.held_out_II is None:
        return Choice(versions[0])
    errors = held_out_errors(weight_OI, (version.dequantize() for version in versions), seen)
    least = errors.index(min(errors))
    return Choice(versions[least], VERSIONS[least], errors[least], errors[0])


def held_out_errors(weight_OI: torch.Tensor, versions: Iterable[torch.Tensor], seen: Statistics) -> list[float]:
    """||Q x - W (x + d)||^2 / ||W x||^2 over the held-out tokens, of each Q [O, I]; d is 0 without the original beside.

    Raises: ValueError where no tokens were held out.
    """
    if seen.held_out_II is None:
        raise ValueError("no tokens were held out")
    shifts = seen.shifts
    whole = energy(weight_OI, seen.held_out_II)
    shifted = energy(weight_OI, shifts.energy_II) if shifts else 0.0
    errors = []
    for quantized_OI in versions:
        off_OI = quantized_OI.to(torch.float32) - weight_OI
        lost = shifted + energy(off_OI, seen.held_out_II)
        if shifts:
            lost -= 2 * float(((weight_OI @ shifts.held_out_II) * off_OI).sum(dtype=torch.float64))
        errors.append(lost / whole if whole > 0 else 0.0)
    return errors
