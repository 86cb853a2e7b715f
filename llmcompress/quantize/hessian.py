"""The Hessian of a linear's output error, accumulated from its inputs.

For a linear y = W x and a quantized Q, the squared error over T tokens is tr((W - Q) H (W - Q)^T) * T with
H = (1/T) sum_t x_t x_t^T (GPTQ, Frantar et al. 2022, section 3.1; the paper's factor 2 changes nothing). It depends on
the input alone, so linears that read the same tensor share it.

Shapes: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def accumulate(inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, int]:
    """Mean of x x^T over the real tokens of all batches, in float32 (products and sums; inputs are cast if need be).

    inputs: [..., I] each. masks: bool, of the inputs' leading shape, False on padding; None = every token is real.
    Returns: hessian_II and the number of tokens; zeros and 0 when no token is real.
    """
    width = inputs[0].shape[-1]
    hessian_II = torch.zeros(width, width, dtype=torch.float32, device=inputs[0].device)
    num_tokens = 0
    for x, mask in zip(inputs, masks, strict=True):
        x_TI = (x.reshape(-1, width) if mask is None else x[mask]).to(torch.float32)
        hessian_II.addmm_(x_TI.t(), x_TI)
        num_tokens += x_TI.shape[0]
    return hessian_II.div_(max(num_tokens, 1)), num_tokens


def relative_error(weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 over the calibration tokens; without a Hessian, ||W - Q||^2 / ||W||^2.

    0 for a weight (or input) that is all zero and kept so.
    """
    difference_OI = weight_OI.to(torch.float32) - quantized_OI.to(torch.float32)
    lost, whole = _energy(difference_OI, hessian_II), _energy(weight_OI.to(torch.float32), hessian_II)
    return lost / whole if whole > 0 else 0.0


def _energy(weight_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float:
    right_OI = weight_OI if hessian_II is None else weight_OI @ hessian_II
    return float((weight_OI * right_OI).sum(dtype=torch.float64))
