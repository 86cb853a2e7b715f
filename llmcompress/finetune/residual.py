"""Begin with what quantization lost: the first factors of an adapter on a quantized base.

A fresh adapter adds nothing, so training begins at the quantized model. The residual R = W - Q is known; the best
B A of rank r for it is its truncated SVD, which is LoftQ's first iteration (Li et al. 2023). Best for the weight,
though, is not best for the output: over inputs with H = mean of x x^T the output error is

    ||(R - B A) X||^2 / T  =  ||(R - B A) S||_F^2        with S S = H, S = H^(1/2)

so the truncated SVD of R S, with S undone in A, is the best one for what the layer computes (the same weighting as in
EoRA, Liu et al. 2024):

    R S = U Z V^T      B = U_r Z_r^(1/2)      A = Z_r^(1/2) V_r^T S^(-1)

Shapes: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import torch

DAMPENING_FRAC = 1e-4
"""Added to the diagonal of H, as a fraction of its mean: directions that no input took still need an inverse."""


def residual_factors(
    residual_OI: torch.Tensor, rank: int, hessian_II: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [O, R] and A [R, I], float32, whose product is closest to the residual; on the outputs where H is given.

    A rank above the smaller side is filled up with zeros. Computed in float64.
    """
    residual = residual_OI.double()
    if hessian_II is None:
        left_OK, size_K, right_KI = torch.linalg.svd(residual, full_matrices=False)
    else:
        values_I, basis_II = _spectrum(hessian_II)
        scaled_OI = (residual @ basis_II * values_I.sqrt()) @ basis_II.t()
        left_OK, size_K, right_KI = torch.linalg.svd(scaled_OI, full_matrices=False)
        right_KI = (right_KI @ basis_II / values_I.sqrt()) @ basis_II.t()
    kept = min(rank, len(size_K))
    root_K = size_K[:kept].sqrt()
    b_OR = torch.zeros(residual.shape[0], rank, dtype=torch.float64)
    a_RI = torch.zeros(rank, residual.shape[1], dtype=torch.float64)
    b_OR[:, :kept] = left_OK[:, :kept] * root_K
    a_RI[:kept] = root_K[:, None] * right_KI[:kept]
    return b_OR.float(), a_RI.float()


def _spectrum(hessian_II: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, dampened and so above zero, and eigenvectors of H in float64; those of the identity for H = 0."""
    hessian = hessian_II.double()
    mean = hessian.diagonal().mean()
    values_I, basis_II = torch.linalg.eigh(hessian)
    if not bool(mean > 0):
        return torch.ones_like(values_I), basis_II
    return values_I.clamp(min=0) + DAMPENING_FRAC * mean, basis_II
