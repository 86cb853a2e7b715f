"""What is tried beside a method's own solution is kept only where it lowers the error on tokens nobody solved on.

    W, H ──> method ──> plain ──> refine ──> refined
                          │                    │
                          └─ error on H held out: the lower of the two ─┘

So an option can cost time and never quality: the error that a linear ends with is at most that of the plain method, on
rows that neither of them has seen. Both errors are in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmcompress.quantize.hessian import Hessians, dampened, relative_error
from llmcompress.quantize.refine import refine
from llmcompress.quantize.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Choice:
    """The weight that is kept, and the relative errors on held-out tokens: its own, and the plain method's.

    Both are None where nothing was tried.
    """

    weight: QuantizedWeight
    held_out_error: float | None = None
    plain_held_out_error: float | None = None


def choose(
    weight_OI: torch.Tensor, plain: QuantizedWeight, seen: Hessians, dampening_frac: float, scale_dtype: torch.dtype,
    num_sweeps: int,
) -> Choice:  # fmt: skip
    """`plain`, or its refinement by `num_sweeps` sweeps under H damped by `dampening_frac`; see `tried` and `best`."""
    return best(weight_OI, tried(weight_OI, plain, seen, dampening_frac, scale_dtype, num_sweeps), seen)


def tried(
    weight_OI: torch.Tensor, plain: QuantizedWeight, seen: Hessians, dampening_frac: float, scale_dtype: torch.dtype,
    num_sweeps: int,
) -> list[QuantizedWeight]:  # fmt: skip
    """`plain`, then what was made of it. Without held-out tokens, or with no sweeps, nothing is. Rows are independent.

    weight_OI: float32 [O, I].
    """
    if seen.held_out_II is None or num_sweeps == 0:
        return [plain]
    damped_II = dampened(seen.solve_II, dampening_frac).cpu()
    return [plain, refine(weight_OI, plain, damped_II, scale_dtype, num_sweeps)]


def best(weight_OI: torch.Tensor, versions: Sequence[QuantizedWeight], seen: Hessians) -> Choice:
    """The version of least error on the held-out tokens; the earlier of two that are equal."""
    if len(versions) == 1 or seen.held_out_II is None:
        return Choice(versions[0])
    errors = [relative_error(weight_OI, one.dequantize(), seen.held_out_II) for one in versions]
    least = errors.index(min(errors))
    return Choice(versions[least], errors[least], errors[0])
