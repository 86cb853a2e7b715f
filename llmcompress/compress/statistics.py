"""The Hessian of a linear's output error, accumulated from its inputs.

For a linear y = W x and a quantized Q, the squared error over T tokens is tr((W - Q) H (W - Q)^T) * T with
H = (1/T) sum_t x_t x_t^T (GPTQ, Frantar et al. 2022, section 3.1; the paper's factor 2 changes nothing). It depends on
the input alone, so linears that read the same tensor share it.

Shapes: T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmcompress.compress.methods.base import ACCUMULATED, Need
from llmcompress.errors import LLMCompressError

HELD_OUT_SHARE = 16
"""One in so many calibration tokens is kept from the solver, to judge what is tried beside it."""

PANELS = 8
"""The upper triangle is taken in so many bands of rows, each from its diagonal on: 9/16 of the whole product."""


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


class ShiftSum:
    """The sum of d x^T under way, d = what the original model reads less what is read, x = what is read.

    Not symmetric, so the whole product is taken, in float32.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, shift_TI: torch.Tensor, x_TI: torch.Tensor) -> None:
        """One batch."""
        self.sum_II.addmm_(shift_TI.t(), x_TI)
        self.num_tokens += len(x_TI)

    def mean(self) -> torch.Tensor:
        """The mean of d x^T; zeros without a token. Ends the sum."""
        return self.sum_II.div_(max(self.num_tokens, 1))


@dataclass(frozen=True, slots=True)
class Shifts:
    """How far the original model's input is from the one that is read, d = x_original - x, as means over tokens.

    solve_II, held_out_II: d x^T over the tokens that are solved on, and over those held out. energy_II: d d^T over the
    latter.
    """

    solve_II: torch.Tensor
    held_out_II: torch.Tensor
    energy_II: torch.Tensor


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration text says of one input tensor: everything that a method may ask for.

    hessian_II: mean of x x^T over the tokens that are solved on. held_out_II: the same of tokens that the solver never
    sees, None where the text is too short to spare any. num_tokens: real tokens in both together. shifts: where the
    original model ran beside.
    """

    hessian_II: torch.Tensor
    held_out_II: torch.Tensor | None = None
    num_tokens: int = 0
    shifts: Shifts | None = None

    def cpu(self) -> Statistics:
        """The same on the processor."""
        held_out_II = None if self.held_out_II is None else self.held_out_II.cpu()
        shifts = self.shifts and Shifts(
            self.shifts.solve_II.cpu(), self.shifts.held_out_II.cpu(), self.shifts.energy_II.cpu()
        )
        return Statistics(self.hessian_II.cpu(), held_out_II, self.num_tokens, shifts)


class StatisticsSums:
    """The statistics of one input tensor under way, those that are needed and no others.

    The last sixteenth of every batch's tokens is held out: whole rows wherever a batch has a multiple of sixteen.
    needs: see `methods.base.Need`; with "shift" the original's inputs come too.
    """

    def __init__(self, width: int, device: torch.device, needs: frozenset[Need] = frozenset({"hessian"})) -> None:
        assert needs <= ACCUMULATED, f"nobody accumulates {', '.join(sorted(needs - ACCUMULATED))}"
        self.solve, self.held_out = HessianSum(width, device), HessianSum(width, device)
        self.shifts: tuple[ShiftSum, ShiftSum, HessianSum] | None = None
        if "shift" in needs:
            self.shifts = ShiftSum(width, device), ShiftSum(width, device), HessianSum(width, device)

    def every(self) -> tuple[HessianSum | ShiftSum, ...]:
        """All sums, for adding them up over processes."""
        return (self.solve, self.held_out, *(self.shifts or ()))

    @property
    def num_tokens(self) -> int:
        """Real tokens in both together."""
        return self.solve.num_tokens + self.held_out.num_tokens

    def add(self, x: torch.Tensor, mask: torch.Tensor | None, original: torch.Tensor | None = None) -> None:
        """One batch; see `HessianSum.add`. original: of the shape of `x`, where shifts are needed."""
        mask_T = None if mask is None else mask.reshape(-1)
        num_tokens = x[..., 0].numel()
        cut = num_tokens - num_tokens // HELD_OUT_SHARE

        def real(whole: torch.Tensor, part: slice) -> torch.Tensor:
            part_TI = whole.reshape(-1, whole.shape[-1])[part]
            return part_TI if mask_T is None else part_TI[mask_T[part]]

        for index, part in enumerate((slice(cut), slice(cut, None))):
            x_TI = real(x, part)
            (self.solve, self.held_out)[index].add(x_TI, None)
            if self.shifts and original is not None:
                x_TI = x_TI.to(torch.float32)
                shift_TI = real(original, part).to(torch.float32) - x_TI
                self.shifts[index].add(shift_TI, x_TI)
                if index == 1:
                    self.shifts[2].add(shift_TI, None)

    def means(self) -> Statistics:
        """What was seen. Ends the sums."""
        solve_II, num_solve = self.solve.mean()
        held_out_II, num_held_out = self.held_out.mean()
        shifts = None
        if self.shifts and num_held_out:
            solve, held_out, energy = self.shifts
            shifts = Shifts(solve.mean(), held_out.mean(), energy.mean()[0])
        return Statistics(solve_II, held_out_II if num_held_out else None, num_solve + num_held_out, shifts)


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


def relative_error(weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 over the calibration tokens; without a Hessian, ||W - Q||^2 / ||W||^2.

    0 for a weight (or input) that is all zero and kept so.
    """
    own_OI = weight_OI.to(torch.float32)
    lost, whole = energy(own_OI - quantized_OI.to(torch.float32), hessian_II), energy(own_OI, hessian_II)
    return lost / whole if whole > 0 else 0.0


def energy(rows_OI: torch.Tensor, hessian_II: torch.Tensor | None) -> float:
    """tr(A H A^T) of rows A, in the dtype of both; without a Hessian, the sum of squares.

    That is the sum of A^T A times H, entry by entry. Both are symmetric: what lies right of a panel's diagonal block
    counts twice, and what lies left is not computed.
    """
    if hessian_II is None:
        return float(rows_OI.square().sum(dtype=torch.float64))
    found, width = 0.0, len(hessian_II)
    step = -(-width // PANELS)
    for start in range(0, width, step):
        panel_BI = rows_OI[:, start : start + step].t() @ rows_OI[:, start:]
        panel_BI *= hessian_II[start : start + step, start:]
        found += 2 * float(panel_BI.sum(dtype=torch.float64)) - float(panel_BI[:, :step].sum(dtype=torch.float64))
    return found
