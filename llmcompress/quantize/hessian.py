"""The Hessian of a linear's output error, accumulated from its inputs.

For a linear y = W x and a quantized Q, the squared error over T tokens is tr((W - Q) H (W - Q)^T) * T with
H = (1/T) sum_t x_t x_t^T (GPTQ, Frantar et al. 2022, section 3.1; the paper's factor 2 changes nothing). It depends on
the input alone, so linears that read the same tensor share it.

Shapes: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmcompress.errors import LLMCompressError

HELD_OUT_SHARE = 16
"""One in so many calibration tokens is kept from the solver, to judge what is tried beside it."""

PANELS = 8
"""The upper triangle is summed in so many bands of rows, each from its diagonal on: 9/16 of the whole product."""


class HessianSum:
    """The sum of x x^T under way: batches are added as they come, and none is kept.

    Sums are in float32. Where the inputs are bfloat16 on a GPU they stay so for the product: its terms are exact in
    float32, which is what they are added in (`out_dtype`), at the rate of the tensor cores.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """One batch [..., I]; mask: bool, of its leading shape, False on padding; None = every token is real."""
        width = len(self.sum_II)
        x_TI = x.reshape(-1, width) if mask is None else x[mask]
        exact = x_TI.is_cuda and x_TI.dtype == torch.bfloat16
        x_TI = x_TI if exact else x_TI.to(torch.float32)
        step = -(-width // PANELS)
        for start in range(0, width, step):
            rows_TB, right_TI = x_TI[:, start : start + step], x_TI[:, start:]
            panel_BI = self.sum_II[start : start + step, start:]
            if exact:
                panel_BI += torch.mm(rows_TB.t(), right_TI, out_dtype=torch.float32)
            else:
                panel_BI.addmm_(rows_TB.t(), right_TI)
        self.num_tokens += len(x_TI)

    def mean(self) -> tuple[torch.Tensor, int]:
        """The mean of x x^T, symmetric to the bit, and the number of tokens; zeros and 0 without any. Ends the sum."""
        width, step = len(self.sum_II), -(-len(self.sum_II) // PANELS)
        self.sum_II.div_(max(self.num_tokens, 1))
        for start in range(0, width, step):
            stop = min(start + step, width)
            own_BB = self.sum_II[start:stop, start:stop]
            own_BB.copy_(own_BB.triu() + own_BB.triu(1).t())
            self.sum_II[stop:, start:stop] = self.sum_II[start:stop, stop:].t()
        return self.sum_II, self.num_tokens


def accumulate(inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, int]:
    """Mean of x x^T over the real tokens of all batches, in float32, and their number; see `HessianSum`.

    inputs: [..., I] each. masks: bool, of the inputs' leading shape, False on padding; None = every token is real.
    """
    total = HessianSum(inputs[0].shape[-1], inputs[0].device)
    for x, mask in zip(inputs, masks, strict=True):
        total.add(x, mask)
    return total.mean()


@dataclass(frozen=True, slots=True)
class Hessians:
    """What one input tensor says: the Hessian to solve on, and the one of tokens that the solver never sees.

    num_tokens: real tokens in both together. held_out_II: None where the text is too short to spare any.
    """

    solve_II: torch.Tensor
    held_out_II: torch.Tensor | None
    num_tokens: int

    def cpu(self) -> Hessians:
        """The same on the processor."""
        held_out_II = None if self.held_out_II is None else self.held_out_II.cpu()
        return Hessians(self.solve_II.cpu(), held_out_II, self.num_tokens)


class HessianSums:
    """Both Hessians under way: the last sixteenth of every batch's tokens goes to the one held out.

    A sixteenth of a batch is whole rows wherever it has a multiple of sixteen.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.solve, self.held_out = HessianSum(width, device), HessianSum(width, device)

    @property
    def num_tokens(self) -> int:
        """Real tokens in both together."""
        return self.solve.num_tokens + self.held_out.num_tokens

    def add(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """One batch; see `HessianSum.add`."""
        x_TI = x.reshape(-1, x.shape[-1])
        mask_T = None if mask is None else mask.reshape(-1)
        cut = len(x_TI) - len(x_TI) // HELD_OUT_SHARE
        self.solve.add(x_TI[:cut], None if mask_T is None else mask_T[:cut])
        self.held_out.add(x_TI[cut:], None if mask_T is None else mask_T[cut:])

    def means(self) -> Hessians:
        """What was seen. Ends the sums."""
        solve_II, num_solve = self.solve.mean()
        held_out_II, num_held_out = self.held_out.mean()
        return Hessians(solve_II, held_out_II if num_held_out else None, num_solve + num_held_out)


def hessians(inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> Hessians:
    """Both Hessians of batches at hand; arguments as `accumulate`'s."""
    total = HessianSums(inputs[0].shape[-1], inputs[0].device)
    for x, mask in zip(inputs, masks, strict=True):
        total.add(x, mask)
    return total.means()


def damping(hessian_II: torch.Tensor, dampening_frac: float) -> float:
    """What is added to the diagonal of H: `dampening_frac` of its mean.

    Raises: LLMCompressError for a Hessian that is not finite, or zero throughout.
    """
    mean = float(hessian_II.diagonal().mean())
    if not bool(torch.isfinite(hessian_II.sum())) and not bool(torch.isfinite(hessian_II).all()):
        raise LLMCompressError("its Hessian is not finite", "the model overflows on the calibration text")
    if mean <= 0:
        raise LLMCompressError("its Hessian is zero: every calibration input was zero", "use other calibration text")
    return dampening_frac * mean


def dampened(hessian_II: torch.Tensor, dampening_frac: float) -> torch.Tensor:
    """H plus `dampening_frac` of its mean diagonal on the diagonal; raises as `damping` does."""
    found_II = hessian_II.clone()
    found_II.diagonal().add_(damping(hessian_II, dampening_frac))
    return found_II


ROWS_AT_A_TIME = 1024


def relative_error(weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 over the calibration tokens; without a Hessian, ||W - Q||^2 / ||W||^2.

    0 for a weight (or input) that is all zero and kept so.
    """
    lost = whole = 0.0
    for start in range(0, len(weight_OI), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        own_OI = weight_OI[rows].to(torch.float32)
        lost += _energy(own_OI - quantized_OI[rows].to(torch.float32), hessian_II)
        whole += _energy(own_OI, hessian_II)
    return lost / whole if whole > 0 else 0.0


def _energy(weight_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float:
    right_OI = weight_OI if hessian_II is None else weight_OI @ hessian_II
    return float((weight_OI * right_OI).sum(dtype=torch.float64))
