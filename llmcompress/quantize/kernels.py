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
ROWS = 64


@njit(parallel=True, cache=True, error_model="numpy")
def solve_block(
    columns_BO: Array, factor_BB: Array, scale_GO: Array, zero_GO: Array, group_B: Array, table: Array, top: int,
    codes_BO: Array,
) -> None:  # fmt: skip
    """GPTQ inside one block: round a column, hand its error on to the block's later columns, next column.

    columns_BO: the weights, changed in place into the values of their codes. factor_BB: upper; factor^T factor = H^-1
    there. group_B: which scale each column uses. table: the codebook, empty for an affine grid with codes 0 .. top.
    Writes codes_BO (uint8). Output rows are taken 64 at a time, so that a tile of the block stays in the first cache.
    """
    width, rows = columns_BO.shape
    for tile in prange((rows + ROWS - 1) // ROWS):
        first, end = tile * ROWS, min(tile * ROWS + ROWS, rows)
        error_O = np.empty(ROWS, columns_BO.dtype)
        ratio_O = np.empty(ROWS, columns_BO.dtype)
        none = columns_BO[0, 0] * 0  # of the weight's own dtype, as everything here
        most = none + top
        for j in range(width):
            weight_O, codes_O = columns_BO[j, first:end], codes_BO[j, first:end]
            scale_O, zero_O = scale_GO[group_B[j], first:end], zero_GO[group_B[j], first:end]
            pivot = factor_BB[j, j]
            if table.size:
                codes_O[:] = 0
                for o in range(end - first):
                    ratio_O[o] = weight_O[o] / scale_O[o]
                for c in range(top):
                    middle = table[c] + (table[c + 1] - table[c]) / 2
                    for o in range(end - first):
                        codes_O[o] += ratio_O[o] > middle
                for o in range(end - first):
                    ratio_O[o] = table[codes_O[o]] * scale_O[o]
            else:
                for o in range(end - first):
                    level = min(max(np.rint(weight_O[o] / scale_O[o]) + zero_O[o], none), most)
                    codes_O[o] = np.uint8(level)
                    ratio_O[o] = (level - zero_O[o]) * scale_O[o]
            for o in range(end - first):
                error_O[o] = (weight_O[o] - ratio_O[o]) / pivot
                weight_O[o] = ratio_O[o]
            for k in range(j + 1, width):
                share, later_O = factor_BB[j, k], columns_BO[k, first:end]
                for o in range(end - first):
                    later_O[o] -= error_O[o] * share


@njit(parallel=True, cache=True, error_model="numpy")
def scale_errors(
    weight_OI: Array, importance_I: Array, scale_OGF: Array, zero_OGF: Array, table: Array, top: int, error_OGF: Array
) -> None:
    """Adds to error_OGF the sum over a group of importance * (w - q)^2, q the nearest value under each of F scales."""
    rows, groups, num_factors = scale_OGF.shape
    group = weight_OI.shape[1] // groups
    for o in prange(rows):
        none = weight_OI[0, 0] * 0
        most = none + top
        inverse_F, value_F = np.empty(num_factors, weight_OI.dtype), np.empty(num_factors, weight_OI.dtype)
        for g in range(groups):
            scale_F, zero_F, error_F = scale_OGF[o, g], zero_OGF[o, g], error_OGF[o, g]
            for f in range(num_factors):
                inverse_F[f] = (none + 1) / scale_F[f]
            for i in range(g * group, (g + 1) * group):
                weight, importance = weight_OI[o, i], importance_I[i]
                if table.size:
                    for f in range(num_factors):
                        value_F[f] = table[0]
                    for c in range(top):
                        middle, value = table[c] + (table[c + 1] - table[c]) / 2, table[c + 1]
                        for f in range(num_factors):
                            value_F[f] = value if weight * inverse_F[f] > middle else value_F[f]
                else:
                    for f in range(num_factors):
                        value_F[f] = min(max(np.rint(weight * inverse_F[f]) + zero_F[f], none), most) - zero_F[f]
                for f in range(num_factors):
                    lost = weight - value_F[f] * scale_F[f]
                    error_F[f] += importance * lost * lost


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
        none = value_OI[0, 0] * 0  # of the weight's own dtype, as everything here
        most = none + top
        for j in range(width):
            scale = scale_OG[o, j // group]
            ratio = (value_OI[o, j] + residual_OI[o, j] / hessian_II[j, j]) / scale
            if table.size:
                code = 0
                while code < top and ratio > (table[code] + table[code + 1]) / 2:
                    code += 1
                value = table[code] * scale
            else:
                zero = zero_OG[o, j // group]
                level = min(max(np.rint(ratio) + zero, none), most)
                code = int(level)
                value = (level - zero) * scale
            if code != codes_OI[o, j]:
                step = value - value_OI[o, j]
                codes_OI[o, j] = code
                value_OI[o, j] = value
                moved_O[o] += 1
                for k in range(width):
                    residual_OI[o, k] -= step * hessian_II[j, k]
    return moved_O.sum()  # type: ignore[no-any-return]
