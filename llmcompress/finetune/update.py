"""What an adapter adds to a weight, in numbers.

    LoRA       D = s B A             s = alpha / rank,  rsLoRA: alpha / sqrt(rank)
    AdaLoRA    D = s B diag(E) A     s = alpha / (initial rank + 1e-5)
    DoRA       W' = m (W + D) / ||W + D||   each row scaled to its learned length m
    several    W' = W + sum of weight_k D_k

Sums are taken in float64 and rounded once to the dtype of the file. The check goes another way round: random inputs
through the merged weight on one side, through the base and the two thin factors on the other, and their difference held
against the most that rounding can do.

Shapes: O out_features, I in_features, R rank, K probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Distance from 1 to the next value of a dtype; rounding to nearest errs by half of it, relative to the value."""
NUM_PROBES = 8


@dataclass(frozen=True, slots=True)
class Update:
    """One adapter's part in one linear: scale * b_OR diag(e_R) a_RI; with DoRA the rows' lengths."""

    b_OR: torch.Tensor
    a_RI: torch.Tensor
    scale: float
    e_R: torch.Tensor | None = None
    length_O: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the product."""
        return int(self.a_RI.shape[0])

    def thin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The two factors in float64, scale and singular values in the second."""
        a_RI = self.a_RI.double() * self.scale
        return self.b_OR.double(), a_RI if self.e_R is None else a_RI * self.e_R.double().reshape(-1, 1)

    def dense_OI(self) -> torch.Tensor:
        """The product, float64."""
        b_OR, a_RI = self.thin()
        return b_OR @ a_RI


def merged_weight(weight_OI: torch.Tensor, updates: Sequence[Update]) -> torch.Tensor:
    """The weight with all updates in it, float64 [O, I]; the caller rounds it to the dtype of its file.

    DoRA goes alone: lengths learned for one sum are not those of another.
    """
    total_OI = weight_OI.double()
    for update in updates:
        total_OI = total_OI + update.dense_OI()
        if update.length_O is not None:
            assert len(updates) == 1, "DoRA is merged alone"
            total_OI = total_OI * (update.length_O.double() / torch.linalg.norm(total_OI, dim=1)).unsqueeze(1)
    return total_OI


def probe_excess(merged_OI: torch.Tensor, weight_OI: torch.Tensor, updates: Sequence[Update], seed: int) -> float:
    """How far the merged weight's outputs are from base plus adapter, over what its dtype's rounding allows.

    At most 1 when each entry of `merged_OI` (in the dtype of the file) is the nearest to what it should be: an output
    then errs by no more than half an epsilon times |W'| |x|, and by float64's own rounding beside it.
    """
    generator = torch.Generator().manual_seed(seed)
    x_IK = torch.randn(weight_OI.shape[1], NUM_PROBES, generator=generator, dtype=torch.float64)
    expected_OK = weight_OI.double() @ x_IK
    for update in updates:
        b_OR, a_RI = update.thin()
        expected_OK = expected_OK + b_OR @ (a_RI @ x_IK)
        if update.length_O is not None:
            norm_O = torch.linalg.norm(weight_OI.double() + update.dense_OI(), dim=1)
            expected_OK = expected_OK * (update.length_O.double() / norm_O).unsqueeze(1)
    size_OK = merged_OI.double().abs() @ x_IK.abs()
    error_OK = (merged_OI.double() @ x_IK - expected_OK).abs()
    slack = EPSILON[torch.float64] * 64 * merged_OI.shape[1]
    allowed_OK = (EPSILON[merged_OI.dtype] / 2 * (1 + EPSILON[merged_OI.dtype]) + slack) * size_OK
    tiny = torch.finfo(merged_OI.dtype).tiny * x_IK.abs().sum(0)
    return float((error_OK / (allowed_OK + tiny)).max())
