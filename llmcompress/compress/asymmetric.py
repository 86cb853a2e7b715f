"""Asymmetric calibration: a linear is asked for the original's output although it reads what earlier layers spoiled.

GPTQ asks for W x of the input x that the quantized layers before produce. The original model gives W (x + d), d being
how far its input is from that one. Over the tokens

    ||Q x - W (x + d)||^2  =  ||(Q - A) x||^2 + what no Q changes,      A = W + W E[d x^T] E[x x^T]^-1

so the same solver on the same Hessian, aimed at A instead of W, also makes up for the layers before, as far as d can be
told from x (GPTAQ, Li et al. 2025, section 3; Qronos, Zhang et al. 2025, in the same form). What of d is particular to
the calibration text is fitted too, so the Hessian is damped here as in the solver, and the result stands for choice
beside the others, judged by the error of the first line on tokens held out.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmcompress.compress.statistics import Hessians, energy


def aimed(weight_OI: torch.Tensor, shift_II: torch.Tensor, damped_II: torch.Tensor) -> torch.Tensor:
    """A of the module's docstring, [O, I], in the dtype of `weight_OI`.

    shift_II: mean of d x^T. damped_II: mean of x x^T, damped, so that it has a Cholesky factor.
    """
    factor_II = torch.linalg.cholesky(damped_II)
    return weight_OI + torch.cholesky_solve((weight_OI @ shift_II).t(), factor_II).t()


def held_out_errors(weight_OI: torch.Tensor, candidates: Iterable[torch.Tensor], seen: Hessians) -> list[float]:
    """||Q x - W (x + d)||^2 / ||W x||^2 over the held-out tokens, of each Q [O, I]; d is 0 without the original beside.

    Raises: ValueError where no tokens were held out.
    """
    if seen.held_out_II is None:
        raise ValueError("no tokens were held out")
    shifts = seen.shifts
    whole = energy(weight_OI, seen.held_out_II)
    shifted = energy(weight_OI, shifts.energy_II) if shifts else 0.0
    errors = []
    for quantized_OI in candidates:
        off_OI = quantized_OI.to(torch.float32) - weight_OI
        lost = shifted + energy(off_OI, seen.held_out_II)
        if shifts:
            lost -= 2 * float(((weight_OI @ shifts.held_out_II) * off_OI).sum(dtype=torch.float64))
        errors.append(lost / whole if whole > 0 else 0.0)
    return errors
