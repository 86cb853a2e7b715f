"""What is tried beside a method's own solution is kept only where it lowers the error on tokens nobody solved on.

    W, H ──> method ──> plain ──> refine ──> refined
                          │                    │
                          └─ error on H held out: the lower of the two ─┘

So an option can cost time and never quality: the error that a linear ends with is at most that of the plain method, on
rows that neither of them has seen. Both errors are in the report.
"""

from __future__ import annotations

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
    """`plain`, or its refinement by `num_sweeps` sweeps under H damped by `dampening_frac`.

    Without held-out tokens, or with no sweeps, nothing is tried. weight_OI: float32 [O, I].
    """
    if seen.held_out_II is None or num_sweeps == 0:
        return Choice(plain)
    refined = refine(weight_OI, plain, dampened(seen.solve_II, dampening_frac), scale_dtype, num_sweeps)
    errors = [relative_error(weight_OI, one.dequantize(), seen.held_out_II) for one in (plain, refined)]
    return Choice(refined if errors[1] < errors[0] else plain, min(errors), errors[0])
