"""The inner loops, compiled: one parallel sweep over rows each. The one file that imports numba.

Rows are independent in all of them, so any number of threads gives the same bits. Arithmetic follows the dtype of the
weight: float32 in production, float64 in the tests that hold it against a plain reference.

Shapes: O out_features, B columns of a block, G groups, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import config, njit, prange, set_num_threads

Array = npt.NDArray[Any]
ROWS = 64


def as_torch(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` on as many threads as torch has: left alone, numba tells OpenMP its own number, for all that follows."""

    @wraps(kernel)
    def run(*arguments: Any) -> Any:
        threads = torch.get_num_threads()
        set_num_threads(min(threads, config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        try:
            return kernel(*arguments)
        finally:
            torch.set_num_threads(threads)

    return run


@as_torch
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


@as_torch
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


@as_torch
@njit(parallel=True, cache=True, error_model="numpy")
def descend_codes(
    pull_OB: Array, hessian_BB: Array, value_OB: Array, scale_O: Array, zero_O: Array, table: Array, top: int,
    codes_OB: Array,
) -> int:  # fmt: skip
    """Coordinate descent inside one block: each code in turn to its best place, the others held; how many moved.

    pull_OB = ((W - Q) H) at the block, value_OB = Q there and codes_OB change in place and stay consistent. hessian_BB:
    symmetric.
    """
    rows, width = value_OB.shape
    moved_O = np.zeros(rows, np.int64)
    for o in prange(rows):
        none = value_OB[0, 0] * 0  # of the weight's own dtype, as everything here
        most, scale, zero, pull_B = none + top, scale_O[o], zero_O[o], pull_OB[o]
        for j in range(width):
            ratio = (value_OB[o, j] + pull_B[j] / hessian_BB[j, j]) / scale
            if table.size:
                code = 0
                while code < top and ratio > (table[code] + table[code + 1]) / 2:
                    code += 1
                value = table[code] * scale
            else:
                level = min(max(np.rint(ratio) + zero, none), most)
                code = int(level)
                value = (level - zero) * scale
            if code != codes_OB[o, j]:
                step = value - value_OB[o, j]
                codes_OB[o, j] = code
                value_OB[o, j] = value
                moved_O[o] += 1
                for k in range(width):
                    pull_B[k] -= step * hessian_BB[j, k]
    return moved_O.sum()  # type: ignore[no-any-return]
