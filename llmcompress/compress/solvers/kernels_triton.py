"""GPTQ's loop inside a block as one GPU kernel: no launch a column, no round trip to memory a column.

A program takes 16 or more output rows through all columns of the block. Columns go in tiles of 16: inside a tile each
column is rounded and hands its error on; between tiles that is one small product, in full float32:

    tile 0 ──round 16 columns──> errors ──product──> tile 1 ──round──> errors ──product──> tile 2 ...
                                    └───────────────product──────────────────────────────────┘

The one file that imports triton, which comes with PyTorch's CUDA builds. The arithmetic is that of `kernels.py`: IEEE
division, rounding half to even.

Shapes: O out_features, B columns of a block, G groups; in the kernel T columns of a tile, R rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 16
ROWS = 32
TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Added to a small float32 and taken off again, it leaves the nearest integer, half to even."""


@triton.jit  # type: ignore[untyped-decorator]
def _solve_block(  # type: ignore[no-untyped-def]
    columns_BO, factor_BB, scale_GO, zero_GO, group_B, table, codes_BO, error_BO,
    rows, WIDTH: tl.constexpr, TOP: tl.constexpr, CODEBOOK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile_T = tl.arange(0, TILE)
    real_R = row_R < rows
    for first in range(0, WIDTH, TILE):
        column_T = first + tile_T
        real_TR = (column_T < WIDTH)[:, None] & real_R[None, :]
        place_TR = column_T[:, None] * rows + row_R[None, :]
        weight_TR = tl.load(columns_BO + place_TR, mask=real_TR, other=0.0)
        for before in range(0, first, TILE):
            earlier_T = before + tile_T
            factor_TT = tl.load(
                factor_BB + earlier_T[None, :] * WIDTH + column_T[:, None], mask=(column_T < WIDTH)[:, None], other=0.0
            )
            error_TR = tl.load(error_BO + earlier_T[:, None] * rows + row_R[None, :], mask=real_R[None, :], other=0.0)
            weight_TR -= tl.dot(factor_TT, error_TR, input_precision="ieee")
        errors_TR = tl.zeros((TILE, ROWS), dtype=tl.float32)
        for j in range(TILE):
            if first + j < WIDTH:
                this_T1 = tile_T[:, None] == j
                weight_R = tl.sum(tl.where(this_T1, weight_TR, 0.0), axis=0)
                group = tl.load(group_B + first + j)
                scale_R = tl.load(scale_GO + group * rows + row_R, mask=real_R, other=1.0)
                if CODEBOOK:
                    ratio_R = tl.div_rn(weight_R, scale_R)
                    code_R = tl.zeros((ROWS,), dtype=tl.int32)
                    for c in range(TOP):
                        low, high = tl.load(table + c), tl.load(table + c + 1)
                        code_R += (ratio_R > low + (high - low) / 2).to(tl.int32)
                    value_R = tl.load(table + code_R) * scale_R
                else:
                    zero_R = tl.load(zero_GO + group * rows + row_R, mask=real_R, other=0.0)
                    ratio_R = tl.minimum(tl.maximum(tl.div_rn(weight_R, scale_R), -4096.0), 4096.0)
                    level_R = (ratio_R + TO_INTEGER) - TO_INTEGER + zero_R
                    level_R = tl.minimum(tl.maximum(level_R, 0.0), TOP)
                    code_R = level_R.to(tl.int32)
                    value_R = (level_R - zero_R) * scale_R
                pivot = tl.load(factor_BB + (first + j) * WIDTH + first + j)
                error_R = tl.div_rn(weight_R - value_R, tl.zeros((ROWS,), dtype=tl.float32) + pivot)
                share_T = tl.load(
                    factor_BB + (first + j) * WIDTH + column_T, mask=(tile_T > j) & (column_T < WIDTH), other=0.0
                )
                weight_TR -= share_T[:, None] * error_R[None, :]
                weight_TR = tl.where(this_T1, value_R[None, :], weight_TR)
                errors_TR = tl.where(this_T1, error_R[None, :], errors_TR)
                tl.store(codes_BO + (first + j) * rows + row_R, code_R.to(tl.uint8), mask=real_R)
        tl.store(columns_BO + place_TR, weight_TR, mask=real_TR)
        tl.store(error_BO + place_TR, errors_TR, mask=real_TR)
        tl.debug_barrier()  # the errors of this tile are read by other threads of the program


def solve_block(
    columns_BO: torch.Tensor, factor_BB: torch.Tensor, scale_GO: torch.Tensor, zero_GO: torch.Tensor,
    group_B: torch.Tensor, table: torch.Tensor, top: int,
) -> torch.Tensor:  # fmt: skip
    """GPTQ inside one block in float32; see `codes.solve_block`, whose arguments these are."""
    assert columns_BO.is_contiguous() and columns_BO.dtype == torch.float32
    width, rows = columns_BO.shape
    codes_BO = torch.empty(columns_BO.shape, dtype=torch.uint8, device=columns_BO.device)
    _solve_block[(triton.cdiv(rows, ROWS),)](
        columns_BO, factor_BB.contiguous(), scale_GO, zero_GO, group_B, table, codes_BO, torch.empty_like(columns_BO),
        rows, WIDTH=width, TOP=top, CODEBOOK=table.numel() > 0, TILE=TILE, ROWS=ROWS,
    )  # fmt: skip
    return codes_BO
