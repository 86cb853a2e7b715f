"""The one factorisation that GPTQ needs, a quarter of the usual work and in one matrix.

With H the Hessian, columns in the order in which they are quantized, the textbook way is H = L L^T, H^-1 from L, and
U from H^-1 = U^T U: three operations of some 4/3 K^3 in all. But U^-1 = R is upper triangular with

    H = R R^T,      and that is the ordinary factor of H with rows and columns reversed, reversed back

         H reversed            L (lower)                R = L reversed (upper)
        ┌ c  b  a ┐          ┌ l          ┐           ┌ r  r  r ┐
        │ .  .  . │   ──>    │ l  l       │   ──>     │    r  r │          K^3 / 3, in place
        └ .  .  . ┘          └ l  l  l    ┘           └       r ┘

and R is all that left-looking blocks ask for (`codes.py`): the panel above a block, and the block's own inverse.

Shapes: I in_features, B columns of a block, P columns before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmcompress.errors import LLMCompressError

GATHERED_ROWS = 512


@dataclass(frozen=True, slots=True)
class Factor:
    """R, upper triangular, H = R R^T with columns in the order `order_I`; kept as L, its reverse."""

    lower_II: torch.Tensor
    order_I: torch.Tensor

    @property
    def importance_I(self) -> torch.Tensor:
        """What GPTQ pays for a unit of squared error in each column, R_jj^2 = 1 / U_jj^2, in natural order."""
        return torch.empty_like(self.diagonal_I).index_copy_(0, self.order_I, self.diagonal_I.square())

    @property
    def diagonal_I(self) -> torch.Tensor:
        """R's diagonal, in the order of quantization."""
        return self.lower_II.diagonal().flip(0)

    def part(self, rows: slice, columns: slice) -> torch.Tensor:
        """R[rows, columns], a copy; bounds are given."""
        width = len(self.lower_II)
        down = slice(width - rows.stop, width - rows.start)
        across = slice(width - columns.stop, width - columns.start)
        return self.lower_II[down, across].flip(0, 1)

    def block(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For the block of columns [start, stop): R_PB R_BB^-1, by which earlier errors reach it, and U_BB = R_BB^-1.

        Returns: float [P, B] and [B, B].
        """
        own_BB = self.part(slice(start, stop), slice(start, stop))
        eye_BB = torch.eye(stop - start, dtype=own_BB.dtype, device=own_BB.device)
        inverse_BB = torch.linalg.solve_triangular(own_BB, eye_BB, upper=True)
        above_PB = self.part(slice(0, start), slice(start, stop))
        return above_PB @ inverse_BB, inverse_BB


def factorise(hessian_II: torch.Tensor, order_I: torch.Tensor, damping: float) -> Factor:
    """The factor of H + damping * 1 with columns in `order_I`; in float64 where H's own dtype does not suffice.

    Takes the memory of one more matrix. Raises: LLMCompressError when H is not positive definite even then.
    """
    column = 0
    for dtype in (hessian_II.dtype, torch.float64):
        work_II = _reversed(hessian_II, order_I, dtype)
        work_II.diagonal().add_(damping)
        info = torch.empty((), dtype=torch.int32, device=work_II.device)
        lower_II = work_II.mT  # column-major, as LAPACK works: symmetric on the way in, factored where it lies
        torch.linalg.cholesky_ex(lower_II, out=(lower_II, info))
        if int(info) == 0 and bool(torch.isfinite(lower_II.diagonal()).all()):
            return Factor(lower_II.to(hessian_II.dtype), order_I)
        column = len(hessian_II) - int(info)
    raise LLMCompressError(
        f"its Hessian is singular (Cholesky stops at column {column})",
        "raise dampening_frac, use more calibration text, or pass --on-failure rtn to round such linears",
    )


def _reversed(hessian_II: torch.Tensor, order_I: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    backwards_I = order_I.flip(0)
    work_II = torch.empty_like(hessian_II, dtype=dtype, memory_format=torch.contiguous_format)
    for start in range(0, len(work_II), GATHERED_ROWS):
        rows = slice(start, start + GATHERED_ROWS)
        work_II[rows] = hessian_II[backwards_I[rows]][:, backwards_I]
    return work_II
