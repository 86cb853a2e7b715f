"""What is tried beside a method's own solution is kept only where it lowers the error on tokens nobody solved on.

    W, H ──> method ──> plain ──> refine ──> refined         and, where the original model ran beside,
    A, H ──> method ──> ...   ──> refine ──> aimed           see `asymmetric.py` for A
                          │         │          │
                          └─ error on tokens held out: the least of all ─┘

So an option can cost time and never quality: the error that a linear ends with is at most that of the plain method, on
rows that none of them has seen. Both errors are in the report, and which version was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llmcompress.compress.asymmetric import aimed, held_out_errors
from llmcompress.compress.solvers.refine import refine
from llmcompress.compress.statistics import Hessians, dampened
from llmcompress.compress.weight import QuantizedWeight

Version = Literal["plain", "refined", "aimed"]
VERSIONS: tuple[Version, ...] = ("plain", "refined", "aimed")
"""What `tried` gives, in its order."""

Solve = Callable[[torch.Tensor], QuantizedWeight]
"""A method's solution for a weight [O, I]."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The weight that is kept, which version it is, and errors on held-out tokens: its own, and the plain method's.

    The errors are None where nothing was tried.
    """

    weight: QuantizedWeight
    version: Version = "plain"
    held_out_error: float | None = None
    plain_held_out_error: float | None = None


def tried(
    weight_OI: torch.Tensor, solve: Solve, seen: Hessians, dampening_frac: float, scale_dtype: torch.dtype,
    num_sweeps: int,
) -> list[QuantizedWeight]:  # fmt: skip
    """The plain solution, then what was made of it, as `VERSIONS` calls them. Rows are independent.

    weight_OI: float32 [O, I]. dampening_frac: of H, in `num_sweeps` sweeps of refinement and in aiming. Without
    held-out tokens, or where there is nothing to try, the plain one stands alone.
    """
    plain = solve(weight_OI)
    if seen.held_out_II is None or (num_sweeps == 0 and seen.shifts is None):
        return [plain]
    damped_II = dampened(seen.solve_II, dampening_frac).cpu()
    versions = [plain, refine(weight_OI, plain, damped_II, scale_dtype, num_sweeps)]
    if seen.shifts:
        aim_OI = aimed(weight_OI, seen.shifts.solve_II.cpu(), damped_II)
        versions.append(refine(aim_OI, solve(aim_OI), damped_II, scale_dtype, num_sweeps))
    return versions


def best(weight_OI: torch.Tensor, versions: Sequence[QuantizedWeight], seen: Hessians) -> Choice:
    """The version of least error on the held-out tokens; the earlier of two that are equal."""
    if len(versions) == 1 or seen.held_out_II is None:
        return Choice(versions[0])
    errors = held_out_errors(weight_OI, (one.dequantize() for one in versions), seen)
    least = errors.index(min(errors))
    return Choice(versions[least], VERSIONS[least], errors[least], errors[0])
