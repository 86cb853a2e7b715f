"""GPTQ: round one column at a time and let the columns still free make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ (2022), section 3.3, on any grid. With H the mean of x x^T and U the upper
triangular factor of its inverse, H^-1 = U^T U, quantizing column j to q_j costs ((w_j - q_j) / U_jj)^2 and is made up
for best by   w_k -= (w_j - q_j) / U_jj * U_jk   for all later columns k:

         block (128 columns)          columns after the block
      ┌──────────────────────┬──────────────────────────────────────┐
      │ q  q  q  w -> -> ->  │  W_after -= E @ U[block, after]      │   E: the block's errors (w - q) / U_jj,
      └──────────────────────┴──────────────────────────────────────┘   applied in one product when it is done

Three choices: columns go in descending order of H_jj (`actorder: static`), with groups and scales those of the natural
order, so the file needs no permutation; each group's scale is searched for under the weights 1 / U_jj^2, what GPTQ pays
for an error in column j; U comes from one Cholesky factorisation of the reversed matrix instead of three operations
(H reversed = L L^T, so H = R R^T with R = L reversed, upper triangular, and U = R^-1).

Shapes: O out_features, I in_features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from llmcompress.errors import LLMCompressError
from llmcompress.quantize.grid import Scales, codebook, kernel_arrays, plain_scales, shrunk_scales
from llmcompress.quantize.hessian import dampened
from llmcompress.quantize.kernels import group_error, solve_block
from llmcompress.quantize.nested import nest, unnest
from llmcompress.quantize.weight import QuantizedWeight
from llmcompress.scheme import WeightScheme


class GptqSettings(BaseModel):
    """The knobs of GPTQ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    actorder: Literal["none", "static"] = Field("static", description="order of columns")
    dampening_frac: float = Field(0.05, gt=0, lt=1, description="added to diag(H), as a fraction of mean diag(H)")
    block_size: int = Field(128, ge=1, description="columns between lazy updates")
    scale_search: bool = Field(True, description="shrink scales where that lowers the weighted error")


def inverse_factor(hessian_II: torch.Tensor) -> torch.Tensor:
    """U, upper triangular with H^-1 = U^T U; in float64 where float32 does not suffice.

    Raises: LLMCompressError when H is not positive definite even then.
    """
    column = 0
    for dtype in (hessian_II.dtype, torch.float64):
        flipped, info = torch.linalg.cholesky_ex(hessian_II.to(dtype).flip(0, 1))
        if int(info) == 0:
            eye = torch.eye(len(flipped), dtype=dtype, device=flipped.device)
            factor: torch.Tensor = torch.linalg.solve_triangular(flipped.flip(0, 1), eye, upper=True)
            if bool(torch.isfinite(factor).all()):
                return factor.to(hessian_II.dtype)
        column = len(hessian_II) - int(info)
    raise LLMCompressError(
        f"its Hessian is singular (Cholesky stops at column {column})",
        "raise dampening_frac, use more calibration text, or pass --on-failure rtn to round such linears",
    )


def searched_scales(
    weight_OI: torch.Tensor, importance_I: torch.Tensor, scheme: WeightScheme, scale_dtype: torch.dtype
) -> Scales:
    """Per group, the scale of least importance-weighted squared error among shrunk versions of the plain one."""
    best = plain_scales(weight_OI, scheme, scale_dtype)
    best_error_OG = _group_error(weight_OI, importance_I, best, scheme)
    for factor in torch.linspace(1.1 if scheme.codebook else 0.99, 0.5, 50):
        tried = shrunk_scales(weight_OI, scheme, scale_dtype, factor)
        error_OG = _group_error(weight_OI, importance_I, tried, scheme)
        better_OG = error_OG < best_error_OG
        best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
        zero = best.zero_point_OG
        if zero is not None and tried.zero_point_OG is not None:
            zero = torch.where(better_OG, tried.zero_point_OG, zero)
        best = Scales(torch.where(better_OG, tried.scale_OG, best.scale_OG), zero)
    return best


def gptq_codes(
    weight_OI: torch.Tensor, factor_II: torch.Tensor, scales: Scales, group_I: torch.Tensor, scheme: WeightScheme,
    block_size: int,
) -> torch.Tensor:  # fmt: skip
    """Codes uint8 [O, I] for columns in the order given; `group_I` says which scale each column uses."""
    work_OI = weight_OI.clone(memory_format=torch.contiguous_format)
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.uint8)
    kind = work_OI.numpy().dtype
    scale_OG, zero_OG, table = kernel_arrays(scales.scale_OG, scales.zero_point_OG, scheme, kind)
    for start in range(0, weight_OI.shape[1], block_size):
        block, after = slice(start, start + block_size), slice(start + block_size, None)
        codes = np.empty(work_OI[:, block].shape, np.uint8)
        error = np.empty(codes.shape, kind)
        factor = factor_II[block, block].contiguous().numpy()
        columns = np.ascontiguousarray(work_OI[:, block].numpy())
        solve_block(
            columns, factor, scale_OG, zero_OG, group_I[block].numpy(), table, scheme.num_codes - 1, codes, error
        )
        codes_OI[:, block] = torch.from_numpy(codes)
        work_OI[:, after] -= torch.from_numpy(error) @ factor_II[block, after]
    return codes_OI


def _group_error(
    weight_OI: torch.Tensor, importance_I: torch.Tensor, scales: Scales, scheme: WeightScheme
) -> torch.Tensor:
    weight = np.ascontiguousarray(weight_OI.numpy())
    scale, zero, table = kernel_arrays(scales.scale_OG, scales.zero_point_OG, scheme, weight.dtype)
    error = np.empty(scale.shape, weight.dtype)
    group_error(weight, importance_I.contiguous().numpy(), scale, zero, table, scheme.num_codes - 1, error)
    return torch.from_numpy(error)


@dataclass(frozen=True, slots=True)
class Gptq:
    """GPTQ on any grid; see the module's docstring."""

    name: str = "gptq"
    summary: str = "error feedback through the Hessian of calibration text, scales searched for"
    needs_hessian: bool = True
    settings: type[BaseModel] = GptqSettings

    def solve(
        self, weight_OI: torch.Tensor, hessian_II: torch.Tensor | None, scheme: WeightScheme, scale_dtype: torch.dtype,
        settings: BaseModel,
    ) -> QuantizedWeight:  # fmt: skip
        """Codes that minimise the output error on the calibration text, column by column.

        weight_OI and hessian_II share a dtype, float32 or float64, which is the one computed in.
        Raises: LLMCompressError for a Hessian that is zero, not finite or singular.
        """
        assert isinstance(settings, GptqSettings) and hessian_II is not None
        damped_II = dampened(hessian_II, settings.dampening_frac)
        order = torch.arange(len(damped_II))
        if settings.actorder == "static":
            order = torch.argsort(hessian_II.diagonal(), descending=True, stable=True)
        factor_II = inverse_factor(damped_II[order][:, order])
        natural = torch.argsort(order)
        if settings.scale_search:
            importance_I = factor_II.diagonal().pow(-2)[natural]
            scales = searched_scales(weight_OI, importance_I, scheme, scale_dtype)
        else:
            scales = plain_scales(weight_OI, scheme, scale_dtype)
        if scheme.double_quant:
            nested = nest(scales.scale_OG)
            scales = replace(scales, scale_OG=unnest(nested, weight_OI.shape[0]), nested=nested)
        group_I = order // scheme.group_width(weight_OI.shape[1])
        codes_OI = gptq_codes(weight_OI[:, order], factor_II, scales, group_I, scheme, settings.block_size)
        codes_OI = codes_OI[:, natural].contiguous()
        return QuantizedWeight(codes_OI, scales.scale_OG, scales.zero_point_OG, codebook(scheme), scheme, scales.nested)


ENTRY = Gptq()
