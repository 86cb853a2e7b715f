"""Muon: momentum whose every direction is made equally long, which teaches a small model in fewer steps than AdamW.

The update of a matrix is its momentum M = U S Vᵀ with the singular values replaced by ones, U Vᵀ. Five steps of a
Newton-Schulz iteration come close enough without a decomposition: X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X moves every
singular value in (0, 1] to about one. Rare facts, whose directions are short in M, so learn as fast as common ones.
(Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks". PyTorch's own rounds to bfloat16,
which is slow on a CPU; this one stays in float32.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration, from the paper: the steepest at zero that still ends between about 0.7 and 1.2."""


def orthogonalized(matrix_OI: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """The nearest matrix with all singular values about one (O x I, float32)."""
    a, b, c = COEFFICIENTS
    is_tall = matrix_OI.shape[0] > matrix_OI.shape[1]
    x = matrix_OI.T if is_tall else matrix_OI
    x = x / (x.norm() + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay; for matrices only."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every matrix once; `closure` is not used."""
        for group in self.param_groups:
            for matrix_OI in group["params"]:
                self._move(matrix_OI, group)

    def _move(self, matrix_OI: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[matrix_OI]
        momentum_OI = state.setdefault("momentum", torch.zeros_like(matrix_OI))
        momentum_OI.lerp_(matrix_OI.grad, 1 - group["momentum"])
        direction_OI = orthogonalized(matrix_OI.grad.lerp(momentum_OI, group["momentum"]))
        rows, columns = matrix_OI.shape
        matrix_OI.mul_(1 - group["lr"] * group["weight_decay"])
        matrix_OI.add_(direction_OI, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
