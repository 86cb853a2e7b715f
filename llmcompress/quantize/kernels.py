"""The inner loops, compiled: one parallel sweep over rows each. The one file that imports numba.

Rows are independent in all of them, so any number of threads gives the same bits. Arithmetic follows the dtype of the
weight: float32 in production, float64 in the tests that hold it against a plain reference.

Shapes: O out_features, B columns of a block, G groups, I in_features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange

Array = npt.NDArray[Any]


@njit(parallel=True, cache=True, error_model="numpy")
def solve_block(
    weight_OB: Array, factor_BB: Array, scale_OG: Array, zero_OG: Array, group_B: Array, table: Array, top: int,
    codes_OB: Array, error_OB: Array,
) -> None:  # fmt: skip
    """GPTQ inside one block: round a column, hand its error on to the block's later columns, next column.

    weight_OB: changed in place (later columns take up the error). factor_BB: upper; factor^T factor = H^-1 there.
    group_B: which scale each column uses. table: the codebook, empty for an affine grid with codes 0 .. top.
    Writes codes_OB (uint8) and error_OB = (w - q) / factor_jj, what the columns after the block still have to absorb.
    """
    for o in prange(weight_OB.shape[0]):
        row = weight_OB[o]
        for j in range(weight_OB.shape[1]):
            scale = scale_OG[o, group_B[j]]
            if table.size:
                ratio = row[j] * (1 / scale)
                code = 0
                while code < top and ratio > (table[code] + table[code + 1]) / 2:
                    code += 1
                value = table[code] * scale
            else:
                zero = zero_OG[o, group_B[j]]
                code = int(min(max(np.rint(row[j] / scale) + zero, 0), top))
                value = (code - zero) * scale
            codes_OB[o, j] = code
            error = (row[j] - value) / factor_BB[j, j]
            error_OB[o, j] = error
            for k in range(j + 1, weight_OB.shape[1]):
                row[k] -= error * factor_BB[j, k]


@njit(parallel=True, cache=True, error_model="numpy")
def group_error(
    weight_OI: Array, importance_I: Array, scale_OG: Array, zero_OG: Array, table: Array, top: int, error_OG: Array
) -> None:
    """Writes error_OG = sum over a group of importance * (w - q)^2, with q the nearest value of the grid."""
    rows, width = weight_OI.shape
    group = width // scale_OG.shape[1]
    for o in prange(rows):
        for g in range(scale_OG.shape[1]):
            scale, zero = scale_OG[o, g], zero_OG[o, g]
            inverse = 1 / scale
            total = 0.0
            for i in range(g * group, (g + 1) * group):
                if table.size:
                    ratio = weight_OI[o, i] * inverse
                    code = 0
                    while code < top and ratio > (table[code] + table[code + 1]) / 2:
                        code += 1
                    value = table[code] * scale
                else:
                    value = (min(max(np.rint(weight_OI[o, i] * inverse) + zero, 0), top) - zero) * scale
                total += importance_I[i] * (weight_OI[o, i] - value) ** 2
            error_OG[o, g] = total


@njit(parallel=True, cache=True, error_model="numpy")
def descend_codes(
    residual_OI: Array, hessian_II: Array, value_OI: Array, scale_OG: Array, zero_OG: Array, table: Array, top: int,
    codes_OI: Array,
) -> int:  # fmt: skip
    """One sweep of coordinate descent: each code in turn to its best place, the others held; how many moved.

    residual_OI = (W - Q) H, value_OI = Q and codes_OI change in place and stay consistent. hessian_II: symmetric.
    """
    rows, width = value_OI.shape
    group = width // scale_OG.shape[1]
    moved_O = np.zeros(rows, np.int64)
    for o in prange(rows):
        for j in range(width):
            scale = scale_OG[o, j // group]
            ratio = (value_OI[o, j] + residual_OI[o, j] / hessian_II[j, j]) * (1 / scale)
            if table.size:
                code = 0
                while code < top and ratio > (table[code] + table[code + 1]) / 2:
                    code += 1
                value = table[code] * scale
            else:
                zero = zero_OG[o, j // group]
                code = int(min(max(np.rint(ratio) + zero, 0), top))
                value = (code - zero) * scale
            if code != codes_OI[o, j]:
                step = value - value_OI[o, j]
                codes_OI[o, j] = code
                value_OI[o, j] = value
                moved_O[o] += 1
                for k in range(width):
                    residual_OI[o, k] -= step * hessian_II[j, k]
    return moved_O.sum()  # type: ignore[no-any-return]
