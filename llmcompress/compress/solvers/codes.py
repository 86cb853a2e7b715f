"""GPTQ's codes, block by block, looking left: a block is read once, with all that earlier columns owe it.

The usual form updates every later column after each block (right-looking), so the whole weight is read and written
once a block. With R the factor of `factor.py` and E = W - Q the error of the columns done so far, the same numbers are

    W'_B = W_B + E_P (R_PB R_BB^-1)        P: all columns before the block B
         P: done           B: next
      ┌──────────────────┬─────────┬────────────────┐
      │ E  E  E  E  E  E │  W'     │  W, not touched │   then column by column inside B through U_BB = R_BB^-1
      └──────────────────┴─────────┴────────────────┘

exactly GPTQ's compensated weights at the start of the block; E is the weight's own error, so nothing else is kept.
Inside a block: a compiled loop over rows on a processor, a Triton kernel on a GPU, plain torch without either.

Shapes: O out_features, I in_features, G groups, B columns of a block.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from llmcompress.compress.grid import Scales, codebook
from llmcompress.compress.scheme import WeightGrid
from llmcompress.compress.solvers.factor import Factor


def gptq_codes(
    weight_OI: torch.Tensor, factor: Factor, scales: Scales, grid: WeightGrid, block_size: int
) -> torch.Tensor:
    """Codes uint8 [O, I] in natural column order, for columns quantized in the factor's order.

    Computed in the dtype of `weight_OI` on the device of the factor; returned on the device of `weight_OI`.
    """
    device, order_I = factor.lower_II.device, factor.order_I
    work_IO = weight_OI.to(device).t()[order_I]  # a row is a column of the weight, so that a block lies together
    codes_IO = torch.empty(work_IO.shape, dtype=torch.uint8, device=device)
    group_I = order_I // grid.group_width(len(work_IO))
    scale_OG, zero_OG, table = kernel_inputs(scales, grid, work_IO)
    scale_GO, zero_GO = scale_OG.t().contiguous(), zero_OG.t().contiguous()
    for start in range(0, len(work_IO), block_size):
        block = slice(start, min(start + block_size, len(work_IO)))
        from_left_PB, factor_BB = factor.block(block.start, block.stop)
        columns_BO = torch.addmm(work_IO[block], from_left_PB.t(), work_IO[:start])
        codes_BO = solve_block(columns_BO, factor_BB, scale_GO, zero_GO, group_I[block], table, grid.num_codes - 1)
        codes_IO[order_I[block]] = codes_BO
        work_IO[block] -= columns_BO
    return codes_IO.t().contiguous().to(weight_OI.device)


def solve_block(
    columns_BO: torch.Tensor, factor_BB: torch.Tensor, scale_GO: torch.Tensor, zero_GO: torch.Tensor,
    group_B: torch.Tensor, table: torch.Tensor, top: int,
) -> torch.Tensor:  # fmt: skip
    """Quantize one block, column after column; returns the codes, and leaves their values in `columns_BO`.

    factor_BB: upper triangular, factor^T factor = H^-1 there. group_B: which scale a column uses. table: the codebook,
    empty for an affine grid with codes 0 .. top.
    """
    if columns_BO.is_cuda:
        from llmcompress.compress.solvers import kernels_triton

        return kernels_triton.solve_block(columns_BO, factor_BB, scale_GO, zero_GO, group_B, table, top)
    if not compiled():
        from llmcompress.compress.solvers import kernels_torch

        return kernels_torch.solve_block(columns_BO, factor_BB, scale_GO, zero_GO, group_B, table, top)
    from llmcompress.compress.solvers import kernels

    codes_BO = torch.empty(columns_BO.shape, dtype=torch.uint8)
    kernels.solve_block(
        columns_BO.numpy(), factor_BB.contiguous().numpy(), scale_GO.numpy(), zero_GO.numpy(), group_B.numpy(),
        table.numpy(), top, codes_BO.numpy(),
    )  # fmt: skip
    return codes_BO


def descend_codes(
    pull_OB: torch.Tensor, hessian_BB: torch.Tensor, value_OB: torch.Tensor, scale_O: torch.Tensor,
    zero_O: torch.Tensor, table: torch.Tensor, top: int, codes_OB: torch.Tensor,
) -> int:  # fmt: skip
    """Move each code of a block in turn to its best place, the others held; gives how many moved.

    All of one group. In place, kept consistent: pull_OB = ((W - Q) H) at the block, value_OB = Q there, codes_OB.
    hessian_BB: the block's own, with a positive diagonal. zero_O, table, top: see `kernel_inputs`.
    """
    if pull_OB.is_cuda or not compiled():
        from llmcompress.compress.solvers import kernels_torch

        return kernels_torch.descend_codes(pull_OB, hessian_BB, value_OB, scale_O, zero_O, table, top, codes_OB)
    from llmcompress.compress.solvers import kernels

    return int(
        kernels.descend_codes(
            pull_OB.numpy(), hessian_BB.contiguous().numpy(), value_OB.numpy(), scale_O.contiguous().numpy(),
            zero_O.contiguous().numpy(), table.numpy(), top, codes_OB.numpy(),
        )
    )  # fmt: skip


def scale_errors(weight_OI: torch.Tensor, importance_I: torch.Tensor, tried: Scales, grid: WeightGrid) -> torch.Tensor:
    """[O, G, F]: for F scales of each group, the sum over it of importance * (w - q)^2, q the nearest on the grid."""
    scale_OGF, zero_OGF, table = kernel_inputs(tried, grid, weight_OI)
    if weight_OI.is_cuda or not compiled():
        from llmcompress.compress.solvers import kernels_torch

        return kernels_torch.scale_errors(weight_OI, importance_I, scale_OGF, zero_OGF, table, grid.num_codes - 1)
    from llmcompress.compress.solvers import kernels

    error_OGF = torch.zeros_like(scale_OGF)
    kernels.scale_errors(
        weight_OI.contiguous().numpy(), importance_I.contiguous().numpy(), scale_OGF.numpy(), zero_OGF.numpy(),
        table.numpy(), grid.num_codes - 1, error_OGF.numpy(),
    )  # fmt: skip
    return error_OGF


def kernel_inputs(
    scales: Scales, grid: WeightGrid, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales, zero points and codebook as the loops take them, in dtype and on the device of `like`.

    Zero points are zeros with a codebook, the codebook is empty without one; no scale is zero.
    """
    scale_OG = scales.scale_OG.clamp(min=1e-38).to(like)
    zero_OG = torch.zeros_like(scale_OG) if scales.zero_point_OG is None else scales.zero_point_OG.to(like)
    table = codebook(grid)
    return scale_OG, zero_OG, (scale_OG.new_empty(0) if table is None else table.to(like))


@cache
def compiled() -> bool:
    """Whether the compiled loops can be had on this machine."""
    return find_spec("numba") is not None
