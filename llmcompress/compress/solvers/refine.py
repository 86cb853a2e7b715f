"""Refinement: a finished solution made better by exact descent, whichever method it came from.

GPTQ is greedy: column j is rounded knowing what came before it and never looked at again. With all codes in hand the
error of a row, e = w - q, costs e H e^T, and two moves can only lower it:

    code    q_j + d changes the cost by -2 d (e H)_j + d^2 H_jj: a parabola whose least point on the grid is the value
            nearest to q_j + (e H)_j / H_jj. Rows are independent.
    scale   q = ... + s_g c_g + ...: the same parabola in s_g with (e H c_g) and (c_g H c_g^T), then snapped to what the
            file can hold and taken only where the snapped value still lowers the cost.

Both need e H at the group alone, so a sweep goes from group to group: one product for what all other columns ask of it,
then codes and scale with the group's own piece of H, which fits into a cache.

         columns of a group                     E H[:, group], then codes move one after the other, each telling the
      ┌───────┬─────────┬─────────────────┐     others of its group through H[group, group], then their scale
      │   E   │  E_g    │       E         │
      └───────┴─────────┴─────────────────┘     nothing outside the group is written: a sweep is one product E H in all

This is coordinate descent on the objective of GPTQ (Frantar et al. 2022, section 3.1), as QuantEase (Behdin et al.
2023) does from rounding; started from GPTQ four sweeps are enough. On a Hessian without damping it fits the calibration
text and not the model, so H here is damped like GPTQ's.

Shapes: O out_features, I in_features, G groups, W width of a group, B columns of a block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from llmcompress.compress.grid import Scales, snap
from llmcompress.compress.nested_scales import nearest_codes8, scales_at
from llmcompress.compress.solvers.codes import descend_codes, kernel_inputs
from llmcompress.compress.weight import QuantizedWeight

BLOCK = 128
"""Columns whose codes move between two products, at most; wider groups are taken in parts."""
ROWS = 512
"""Rows taken through all sweeps before the next ones, so that what a block needs stays small."""


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
    error_OI = weight_OI - start.dequantize().to(weight_OI.dtype)
    for first in range(0, len(weight_OI), ROWS):
        rows = slice(first, min(first + ROWS, len(weight_OI)))
        for _ in range(num_sweeps):
            moved = 0
            for g in range(now.scale_OG.shape[1]):
                at = _At(rows, g, _group(now, g))
                pull_OW, moved_codes = _descend_codes(now, at, weight_OI[rows], error_OI[rows], hessian_II)
                moved += moved_codes
                moved += _descend_scales(now, at, weight_OI[rows], error_OI[rows], pull_OW, hessian_II, scale_dtype)
            if moved == 0:
                break
    return now


class _At(NamedTuple):
    """Some rows of one group: the rows, the group's number, and its columns."""

    rows: slice
    g: int
    columns: slice


def rescaled(weight: QuantizedWeight, wanted_OG: torch.Tensor, scale_dtype: torch.dtype) -> QuantizedWeight:
    """The same codes under the scales nearest to `wanted_OG` that the file can hold; `weight` is not changed."""
    nested = replace(weight.nested, codes=weight.nested.codes.clone()) if weight.nested else None
    now = replace(weight, scale_OG=weight.scale_OG.clone(), nested=nested)
    for g in range(now.scale_OG.shape[1]):
        _set_scales(now, _At(slice(0, len(wanted_OG)), g, _group(now, g)), wanted_OG[:, g], scale_dtype)
    return now


def _descend_codes(
    now: QuantizedWeight, at: _At, weight_OI: torch.Tensor, error_OI: torch.Tensor, hessian_II: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Move every code there once, in place with `error_OI` = W - Q; (W - Q) H there, and how many moved."""
    rows, g, columns = at
    zero_OG, moved = now.zero_point_OG, 0
    scales = Scales(now.scale_OG[rows, g : g + 1], None if zero_OG is None else zero_OG[rows, g : g + 1])
    scale_O1, zero_O1, table = kernel_inputs(scales, now.grid, weight_OI)
    for start in range(columns.start, columns.stop, BLOCK):
        block = slice(start, min(start + BLOCK, columns.stop))
        pull_OB = error_OI @ hessian_II[block].t()
        value_OB, codes_OB = weight_OI[:, block] - error_OI[:, block], now.codes_OI[rows, block].contiguous()
        moved += descend_codes(
            pull_OB, hessian_II[block, block], value_OB, scale_O1[:, 0], zero_O1[:, 0], table,
            now.grid.num_codes - 1, codes_OB,
        )  # fmt: skip
        now.codes_OI[rows, block] = codes_OB
        torch.sub(weight_OI[:, block], value_OB, out=error_OI[:, block])
    return (pull_OB if block == columns else error_OI @ hessian_II[columns].t()), moved


def _descend_scales(
    now: QuantizedWeight, at: _At, weight_OI: torch.Tensor, error_OI: torch.Tensor, pull_OW: torch.Tensor,
    hessian_II: torch.Tensor, scale_dtype: torch.dtype,
) -> int:  # fmt: skip
    """Move every row's scale there once, in place with `error_OI`; how many moved. pull_OW: (W - Q) H there."""
    rows, g, columns = at
    unit_OW = _units(now, at).to(weight_OI.dtype)
    slope_O = (pull_OW * unit_OW).sum(1)
    curve_O = ((unit_OW @ hessian_II[columns, columns]) * unit_OW).sum(1)
    scale_O = now.scale_OG[rows, g].clone()
    wanted_O = scale_O + torch.where(curve_O > 0, slope_O / curve_O.clamp(min=1e-38), 0).float()
    _set_scales(now, at, wanted_O, scale_dtype)
    step_O = (now.scale_OG[rows, g] - scale_O).to(weight_OI.dtype)
    lower_O = step_O * (curve_O * step_O - 2 * slope_O) < 0
    _set_scales(now, at, torch.where(lower_O, now.scale_OG[rows, g], scale_O), scale_dtype)
    unit_OW *= now.scale_OG[rows, g, None].to(weight_OI.dtype)
    torch.sub(weight_OI[:, columns], unit_OW, out=error_OI[:, columns])
    return int(lower_O.sum())


def _group(now: QuantizedWeight, g: int) -> slice:
    """The columns of one group."""
    width = now.codes_OI.shape[1] // now.scale_OG.shape[1]
    return slice(g * width, (g + 1) * width)


def _units(now: QuantizedWeight, at: _At) -> torch.Tensor:
    """What the codes there mean before the scale: code - zero point, or the codebook's entry (O x W)."""
    if now.codebook is not None:
        return now.codebook[now.codes_OI[at.rows, at.columns].long()]
    assert now.zero_point_OG is not None
    return now.codes_OI[at.rows, at.columns].float() - now.zero_point_OG[at.rows, at.g, None].float()


def _set_scales(now: QuantizedWeight, at: _At, wanted_O: torch.Tensor, scale_dtype: torch.dtype) -> None:
    """Give the rows there the scale nearest to the wanted one that the file can hold, and that is positive."""
    if now.nested is None:
        now.scale_OG[at.rows, at.g] = snap(wanted_O.clamp(min=1e-38), now.grid, scale_dtype)
        return
    places_O = torch.arange(at.rows.start, at.rows.stop) * now.scale_OG.shape[1] + at.g
    before_O = now.nested.codes[places_O].clone()
    now.nested.codes[places_O] = nearest_codes8(now.nested, places_O, wanted_O)
    usable_O = scales_at(now.nested, places_O) > 0
    now.nested.codes[places_O] = torch.where(usable_O, now.nested.codes[places_O], before_O)
    now.scale_OG[at.rows, at.g] = scales_at(now.nested, places_O)
