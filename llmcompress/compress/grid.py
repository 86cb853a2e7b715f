"""Grids: the values a weight may take, and how a scale is chosen for a group of weights.

    affine    value = scale * (code - zero_point)          code = round(w / scale) + zero_point, clamped
    codebook  value = scale * values[code]                 code = nearest of the values, e.g. the 16 of NF4

A scale is first *snapped* to what the file can hold, so that codes are chosen against the numbers that the engine
will multiply by. The plain choice of scale covers the group's range; `search` shrinks it where that lowers the
weighted error (the idea of GPTQ's `mse` option and of AWQ's clip search, with the weights that GPTQ itself pays).

Shapes: O out_features, I in_features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from llmcompress.compress.nested_scales import nest, unnest
from llmcompress.compress.scheme import WeightGrid
from llmcompress.compress.weight import NestedScale

SMALLEST_SCALE = 2.0**-24  # the least positive float16
LARGEST_SCALE = 65280.0  # the largest number that is both a float16 and a bfloat16


def codebook(grid: WeightGrid, device: torch.device | None = None) -> torch.Tensor | None:
    """float32 [num_codes], ascending; None for an affine grid."""
    return None if grid.values is None else torch.tensor(grid.values, dtype=torch.float32, device=device)


def snap(scale: torch.Tensor, grid: WeightGrid, dtype: torch.dtype) -> torch.Tensor:
    """`scale` rounded to what every layout of this grid can hold: float32 for codebooks, else float16 (and `dtype`).

    A bfloat16 checkpoint stores its scales in bfloat16 in one layout and in float16 in another; values that are
    both keep the two identical. Never zero.
    """
    if grid.codebook:
        return scale.to(torch.float32)
    scale = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
    return (scale.to(torch.bfloat16) if dtype == torch.bfloat16 else scale).to(torch.float32)


@dataclass(frozen=True, slots=True)
class Scales:
    """scale_OG float32 (snapped), zero_point_OG uint8 or None with a codebook, nested where double_quant."""

    scale_OG: torch.Tensor
    zero_point_OG: torch.Tensor | None
    nested: NestedScale | None = None


def plain_scales(weight_OI: torch.Tensor, grid: WeightGrid, dtype: torch.dtype) -> Scales:
    """Scales that cover each group's range: what round-to-nearest uses."""
    return shrunk_scales(weight_OI, grid, dtype, torch.ones(()))


def shrunk_scales(weight_OI: torch.Tensor, grid: WeightGrid, dtype: torch.dtype, factor: torch.Tensor) -> Scales:
    """Scales for each group's range times `factor` (a scalar or [O, G]); see `scales_of_range`."""
    return scales_of_range(*group_range(weight_OI, grid), grid, dtype, factor)


def group_range(weight_OI: torch.Tensor, grid: WeightGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest weight of each group, float32 [O, G] both."""
    group_OGi = weight_OI.reshape(len(weight_OI), -1, grid.group_width(weight_OI.shape[1]))
    low_OG, high_OG = group_OGi.aminmax(dim=-1)
    return low_OG.to(torch.float32), high_OG.to(torch.float32)


def scales_of_range(
    low_OG: torch.Tensor, high_OG: torch.Tensor, grid: WeightGrid, dtype: torch.dtype, factor: torch.Tensor
) -> Scales:
    """Scales for groups that reach from `low_OG` to `high_OG`, times `factor`; shapes broadcast.

    Symmetric: the range is +-max|w|, half a step beyond the outermost codes. Asymmetric: [min(w, 0), max(w, 0)].
    """
    absmax_OG = torch.maximum(low_OG.abs(), high_OG.abs())
    if grid.codebook:
        return Scales(absmax_OG * factor / max(map(abs, grid.values or ())), None)
    steps = grid.num_codes - 1
    if grid.symmetric:
        scale = snap(absmax_OG * factor * (2 / steps), grid, dtype)
        return Scales(scale, torch.full_like(scale, grid.num_codes // 2, dtype=torch.uint8))
    low, high = low_OG.clamp(max=0) * factor, high_OG.clamp(min=0) * factor
    scale = snap((high - low) / steps, grid, dtype)
    return Scales(scale, (-low / scale).round().clamp(0, steps).to(torch.uint8))


def nested(scales: Scales, grid: WeightGrid) -> Scales:
    """The scales as a file with double quantization holds them, rounded to 8 bits; as they are without."""
    if not grid.double_quant:
        return scales
    nested_scale = nest(scales.scale_OG)
    return replace(scales, scale_OG=unnest(nested_scale, len(scales.scale_OG)), nested=nested_scale)


def nearest_codes(weight_OI: torch.Tensor, scales: Scales, grid: WeightGrid) -> torch.Tensor:
    """The nearest code of every weight, uint8 [O, I]; ties to even (affine) or to the lower code (codebook)."""
    group = grid.group_width(weight_OI.shape[1])
    scale_OI = scales.scale_OG.repeat_interleave(group, dim=1)
    if scales.zero_point_OG is not None:
        zero_OI = scales.zero_point_OG.to(torch.float32).repeat_interleave(group, dim=1)
        return (torch.round(weight_OI / scale_OI) + zero_OI).clamp_(0, grid.num_codes - 1).to(torch.uint8)
    table = codebook(grid)
    assert table is not None
    bounds = (table[:-1] + table[1:]) / 2
    inverse_OI = (1.0 / scales.scale_OG.clamp(min=1e-38)).repeat_interleave(group, dim=1)
    ratio_OI = (weight_OI.to(torch.float32) * inverse_OI).clamp(float(table[0]), float(table[-1]))
    return torch.bucketize(ratio_OI, bounds).to(torch.uint8)
