"""The inner loops in plain torch: the same sums as `kernels.py`, for machines without a compiler.

A column needs the columns before it, so the loop is serial; but most of a block's work can still be matrix products.
The block is halved until a tile of 16 columns is left; only inside a tile is there one small step a column:

    ┌────┬────┬─────────┐    solve 0, hand its errors to 1 (product), solve 1, hand both to the second half (product),
    │ 0  │ 1  │         │    and so on: recursion, Toledo 1997.
    └────┴────┴─────────┘

Shapes: O out_features, B columns of a block, G groups, I in_features.
"""

from __future__ import annotations

import torch

TILE = 16


def solve_block(
    columns_BO: torch.Tensor, factor_BB: torch.Tensor, scale_GO: torch.Tensor, zero_GO: torch.Tensor,
    group_B: torch.Tensor, table: torch.Tensor, top: int,
) -> torch.Tensor:  # fmt: skip
    """GPTQ inside one block; see `codes.solve_block`, whose arguments these are. Any device, any float dtype."""
    codes_BO = torch.empty(columns_BO.shape, dtype=torch.uint8, device=columns_BO.device)
    error_BO = torch.empty_like(columns_BO)
    scale_BO, zero_BO = scale_GO[group_B], zero_GO[group_B]

    def solve(start: int, stop: int) -> None:
        if stop - start > TILE:
            middle = (start + stop) // 2
            solve(start, middle)
            columns_BO[middle:stop] -= factor_BB[start:middle, middle:stop].t() @ error_BO[start:middle]
            solve(middle, stop)
            return
        for j in range(start, stop):
            codes_BO[j], value_O = nearest(columns_BO[j], scale_BO[j], zero_BO[j], table, top)
            error_BO[j] = (columns_BO[j] - value_O) / factor_BB[j, j]
            columns_BO[j + 1 : stop] -= factor_BB[j, j + 1 : stop, None] * error_BO[j]
            columns_BO[j] = value_O

    solve(0, len(columns_BO))
    return codes_BO


def nearest(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, table: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest code of each weight (uint8) and the value it stands for; shapes broadcast.

    Ties go to the even step on an affine grid (`table` empty), to the lower code with a codebook.
    """
    if table.numel():
        codes = torch.bucketize((weight / scale).contiguous(), table[:-1] + (table[1:] - table[:-1]) / 2)
        return codes.to(torch.uint8), table[codes] * scale
    codes = (torch.round(weight / scale) + zero).clamp(0, top)
    return codes.to(torch.uint8), (codes - zero) * scale


def descend_codes(
    pull_OB: torch.Tensor, hessian_BB: torch.Tensor, value_OB: torch.Tensor, scale_O: torch.Tensor,
    zero_O: torch.Tensor, table: torch.Tensor, top: int, codes_OB: torch.Tensor,
) -> int:  # fmt: skip
    """Coordinate descent inside one block; see `codes.descend_codes`, whose arguments these are."""
    moved = 0
    for j in range(len(hessian_BB)):
        wanted_O = value_OB[:, j] + pull_OB[:, j] / hessian_BB[j, j]
        code_O, value_O = nearest(wanted_O, scale_O, zero_O, table, top)
        moved += int((code_O != codes_OB[:, j]).sum())
        pull_OB -= (value_O - value_OB[:, j])[:, None] * hessian_BB[j]
        codes_OB[:, j], value_OB[:, j] = code_O, value_O
    return moved


def scale_errors(
    weight_OI: torch.Tensor, importance_I: torch.Tensor, scale_OGF: torch.Tensor, zero_OGF: torch.Tensor,
    table: torch.Tensor, top: int,
) -> torch.Tensor:  # fmt: skip
    """[O, G, F]: the sum over each group of importance * (w - q)^2 under each of its F scales."""
    rows, groups, num_factors = scale_OGF.shape
    weight_OGi = weight_OI.reshape(rows, groups, -1)
    importance_Gi = importance_I.reshape(groups, -1)
    error_OGF = torch.empty_like(scale_OGF)
    for f in range(num_factors):
        _, value_OGi = nearest(weight_OGi, scale_OGF[..., f, None], zero_OGF[..., f, None], table, top)
        error_OGF[..., f] = ((weight_OGi - value_OGi).square_() * importance_Gi).sum(-1)
    return error_OGF
