"""Refinement: a finished solution made better by exact descent, whichever method it came from.

GPTQ is greedy: column j is rounded knowing what came before it and never looked at again. With all codes in hand the
error of a row, e = w - q, costs e H e^T, and two moves can only lower it:

    code    q_j + d changes the cost by -2 d (e H)_j + d^2 H_jj: a parabola whose least point on the grid is the value
            nearest to q_j + (e H)_j / H_jj. Rows are independent; a code that moves updates its row's e H.
    scale   q = ... + s_g c_g + ...: the same parabola in s_g with (e H c_g) and (c_g H c_g^T), then snapped to what the
            file can hold and taken only where the snapped value still lowers the cost.

A sweep is all codes, then all scales. This is coordinate descent on the objective of GPTQ (Frantar et al. 2022,
section 3.1), as QuantEase (Behdin et al. 2023) does from rounding; started from GPTQ four sweeps are enough. On a
Hessian without damping it fits the calibration text and not the model, so H here is damped like GPTQ's.

Shapes: O out_features, I in_features, G groups, W width of a group.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from llmcompress.quantize.grid import kernel_arrays, snap
from llmcompress.quantize.kernels import descend_codes
from llmcompress.quantize.nested import nearest_codes8, unnest
from llmcompress.quantize.weight import QuantizedWeight


def refine(
    weight_OI: torch.Tensor, start: QuantizedWeight, hessian_II: torch.Tensor, scale_dtype: torch.dtype, num_sweeps: int
) -> QuantizedWeight:
    """`start` after `num_sweeps` sweeps; tr((W - Q) H (W - Q)^T) never rises. Inputs are not changed.

    weight_OI, hessian_II: one dtype, float32 or float64, in which is computed. hessian_II: damped, so its diagonal is
    positive. scale_dtype: of the source's weights, which decides what a scale is snapped to. Ends early when nothing
    moves.
    """
    nested = replace(start.nested, codes=start.nested.codes.clone()) if start.nested else None
    now = replace(start, codes_OI=start.codes_OI.clone(), scale_OG=start.scale_OG.clone(), nested=nested)
    value_OI = start.dequantize().to(weight_OI.dtype)
    residual_OI = (weight_OI - value_OI) @ hessian_II
    for _ in range(num_sweeps):
        moved = _descend_codes(now, value_OI, residual_OI, hessian_II)
        moved += _descend_scales(now, value_OI, residual_OI, hessian_II, scale_dtype)
        if moved == 0:
            break
    return now


def rescaled(weight: QuantizedWeight, wanted_OG: torch.Tensor, scale_dtype: torch.dtype) -> QuantizedWeight:
    """The same codes under the scales nearest to `wanted_OG` that the file can hold; `weight` is not changed."""
    nested = replace(weight.nested, codes=weight.nested.codes.clone()) if weight.nested else None
    now = replace(weight, scale_OG=weight.scale_OG.clone(), nested=nested)
    for g in range(now.scale_OG.shape[1]):
        _set_scales(now, g, wanted_OG[:, g], scale_dtype)
    return now


def _descend_codes(
    now: QuantizedWeight, value_OI: torch.Tensor, residual_OI: torch.Tensor, hessian_II: torch.Tensor
) -> int:
    """Move every code once, in place with `value_OI` and `residual_OI` = (W - Q) H; the number of codes that moved."""
    scale, zero, table = kernel_arrays(now.scale_OG, now.zero_point_OG, now.scheme, value_OI.numpy().dtype)
    return int(
        descend_codes(
            residual_OI.numpy(), hessian_II.numpy(), value_OI.numpy(), scale, zero, table, now.scheme.num_codes - 1,
            now.codes_OI.numpy(),
        )
    )  # fmt: skip


def _descend_scales(
    now: QuantizedWeight, value_OI: torch.Tensor, residual_OI: torch.Tensor, hessian_II: torch.Tensor,
    scale_dtype: torch.dtype,
) -> int:  # fmt: skip
    """Move every group's scale once, in place with `value_OI` and `residual_OI`; the number of scales that moved."""
    num_groups, moved = now.scale_OG.shape[1], 0
    width, pull_OI = value_OI.shape[1] // num_groups, torch.empty_like(residual_OI)
    for g in range(num_groups):
        group = slice(g * width, (g + 1) * width)
        unit_OW = _units(now, g, group).to(value_OI.dtype)
        torch.mm(unit_OW, hessian_II[group], out=pull_OI)
        slope_O = (residual_OI[:, group] * unit_OW).sum(1)
        curve_O = (pull_OI[:, group] * unit_OW).sum(1)
        scale_O = now.scale_OG[:, g].clone()
        wanted_O = scale_O + torch.where(curve_O > 0, slope_O / curve_O.clamp(min=1e-38), 0).float()
        _set_scales(now, g, wanted_O, scale_dtype)
        step_O = (now.scale_OG[:, g] - scale_O).to(value_OI.dtype)
        lower_O = step_O * (curve_O * step_O - 2 * slope_O) < 0
        _set_scales(now, g, torch.where(lower_O, now.scale_OG[:, g], scale_O), scale_dtype)
        value_OI[:, group] = unit_OW * now.scale_OG[:, g, None].to(value_OI.dtype)
        residual_OI.addcmul_(torch.where(lower_O, step_O, 0)[:, None], pull_OI, value=-1)
        moved += int(lower_O.sum())
    return moved


def _units(now: QuantizedWeight, g: int, group: slice) -> torch.Tensor:
    """What the codes of one group mean before the scale: code - zero point, or the codebook's entry (O x W)."""
    if now.codebook is not None:
        return now.codebook[now.codes_OI[:, group].long()]
    assert now.zero_point_OG is not None
    return now.codes_OI[:, group].float() - now.zero_point_OG[:, g, None].float()


def _set_scales(now: QuantizedWeight, g: int, wanted_O: torch.Tensor, scale_dtype: torch.dtype) -> None:
    """Give group `g` of every row the scale nearest to the wanted one that the file can hold, and that is positive."""
    if now.nested is None:
        now.scale_OG[:, g] = snap(wanted_O.clamp(min=1e-38), now.scheme, scale_dtype)
        return
    rows, num_groups = now.scale_OG.shape
    places_O = torch.arange(rows) * num_groups + g
    before_O = now.nested.codes[places_O].clone()
    now.nested.codes[places_O] = nearest_codes8(now.nested, places_O, wanted_O)
    usable_O = unnest(now.nested, rows)[:, g] > 0
    now.nested.codes[places_O] = torch.where(usable_O, now.nested.codes[places_O], before_O)
    now.scale_OG[:, g] = unnest(now.nested, rows)[:, g]
