"""The scale of each group: the best of the plain one and fifty narrower, by the squared error that GPTQ pays for.

A scale that covers a group's range spends codes on its outermost weight. Each factor in turn narrows the range; what is
clipped costs more, what stays inside costs less, and the sum of importance * (w - q)^2 over the group decides. All
factors are tried in one sweep: the loop over them is the innermost, where a processor does many at once and a weight is
read one time instead of fifty.

Shapes: O out_features, I in_features, G groups, F factors.
"""

from __future__ import annotations

import torch

from llmcompress.compress.grid import Scales, group_range, scales_of_range
from llmcompress.compress.scheme import WeightGrid
from llmcompress.compress.solvers.codes import scale_errors

ROWS = 512
"""Rows searched at a time: what bounds the memory of the candidates."""


def factors(grid: WeightGrid) -> torch.Tensor:
    """What the range is multiplied by, float32 [F]: 1 first, so that a tie keeps the plain scale."""
    return torch.cat([torch.ones(1), torch.linspace(1.1 if grid.codebook else 0.99, 0.5, 50)])


def searched_scales(
    weight_OI: torch.Tensor, importance_I: torch.Tensor, grid: WeightGrid, scale_dtype: torch.dtype
) -> Scales:
    """Per group, the scale of least importance-weighted squared error; never worse in it than the plain one."""
    found = [_searched(rows_OI, importance_I, grid, scale_dtype) for rows_OI in weight_OI.split(ROWS)]
    zeros = [scales.zero_point_OG for scales in found if scales.zero_point_OG is not None]
    return Scales(torch.cat([scales.scale_OG for scales in found]), torch.cat(zeros) if zeros else None)


def _searched(
    weight_OI: torch.Tensor, importance_I: torch.Tensor, grid: WeightGrid, scale_dtype: torch.dtype
) -> Scales:
    low_OG, high_OG = group_range(weight_OI, grid)
    tried = scales_of_range(low_OG[..., None], high_OG[..., None], grid, scale_dtype, factors(grid).to(low_OG))
    best_OG1 = scale_errors(weight_OI, importance_I, tried, grid).argmin(-1, keepdim=True)
    zero = tried.zero_point_OG
    return Scales(
        tried.scale_OG.gather(-1, best_OG1)[..., 0], None if zero is None else zero.gather(-1, best_OG1)[..., 0]
    )
