"""GPTQ written down plainly, column by column in float64: what the fast solver is held against.

No blocks, no lazy updates, no compiled kernel, and the inverse Hessian formed and updated as in Optimal Brain
Compression (Frantar and Alistarh 2022, equation 3): after quantizing column j, remove it from H^-1 by one step of
Gaussian elimination. GPTQ's Cholesky form is derived from this one, so agreement tests the derivation too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def nearest(value: float, scale: float, zero: float, table: Matrix | None, top: int) -> tuple[int, float]:
    """The nearest code and its value."""
    if table is not None:
        middles = (table[:-1] + table[1:]) / 2
        code = int(np.searchsorted(middles, value / scale, side="left"))
        return code, float(table[code] * scale)
    code = int(np.clip(np.round(value / scale) + zero, 0, top))
    return code, float((code - zero) * scale)


def solve(
    weight: Matrix, hessian: Matrix, scale: Matrix, zero: Matrix, table: Matrix | None, top: int,
    order: npt.NDArray[np.int64], group: int,
) -> npt.NDArray[np.uint8]:  # fmt: skip
    """Codes [O, I] in natural column order, columns taken in `order`; `hessian` is already damped."""
    work, codes = weight.copy(), np.zeros(weight.shape, np.uint8)
    inverse = np.linalg.inv(hessian)
    free = list(order)
    while free:
        j = free.pop(0)
        for o in range(weight.shape[0]):
            g = j // group
            code, value = nearest(work[o, j], scale[o, g], zero[o, g], table, top)
            codes[o, j] = code
            error = (work[o, j] - value) / inverse[j, j]
            work[o, free] -= error * inverse[j, free]
        inverse -= np.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return codes
