"""GPTQ: round one column at a time and let the columns still free make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ (2022), section 3.3, on any grid. With H the mean of x x^T and U the upper
triangular factor of its inverse, H^-1 = U^T U, quantizing column j to q_j costs ((w_j - q_j) / U_jj)^2 and is made up
for best by   w_k -= (w_j - q_j) / U_jj * U_jk   for all later columns k:

         block (128 columns)          columns after the block
      ┌──────────────────────┬──────────────────────────────────────┐
      │ q  q  q  w -> -> ->  │  W_after -= E @ U[block, after]      │   E: the block's errors (w - q) / U_jj,
      └──────────────────────┴──────────────────────────────────────┘   applied in one product when it is done

Two choices: columns go in descending order of H_jj (`actorder: static`), with groups and scales those of the natural
order, so the file needs no permutation; each group's scale is searched for under the weights 1 / U_jj^2, what GPTQ pays
for an error in column j. How U is had for a quarter of the usual work is in `solvers/factor.py`, how the blocks are
taken without touching the columns after them in `solvers/codes.py`.

Shapes: O out_features, I in_features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from llmcompress.compress.grid import codebook, plain_scales
from llmcompress.compress.nested_scales import nest, unnest
from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.solvers.codes import gptq_codes
from llmcompress.compress.solvers.factor import factorise
from llmcompress.compress.solvers.scale_search import searched_scales
from llmcompress.compress.statistics import damping
from llmcompress.compress.weight import QuantizedWeight


class GptqSettings(BaseModel):
    """The knobs of GPTQ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    actorder: Literal["none", "static"] = Field("static", description="order of columns")
    dampening_frac: float = Field(0.05, gt=0, lt=1, description="added to diag(H), as a fraction of mean diag(H)")
    block_size: int = Field(128, ge=1, description="columns between lazy updates")
    scale_search: bool = Field(True, description="shrink scales where that lowers the weighted error")


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
        order_I = torch.arange(len(hessian_II), device=hessian_II.device)
        if settings.actorder == "static":
            order_I = torch.argsort(hessian_II.diagonal(), descending=True, stable=True)
        factor = factorise(hessian_II, order_I, damping(hessian_II, settings.dampening_frac))
        if settings.scale_search:
            scales = searched_scales(weight_OI, factor.importance_I.to(weight_OI.device), scheme, scale_dtype)
        else:
            scales = plain_scales(weight_OI, scheme, scale_dtype)
        if scheme.double_quant:
            nested = nest(scales.scale_OG)
            scales = replace(scales, scale_OG=unnest(nested, weight_OI.shape[0]), nested=nested)
        codes_OI = gptq_codes(weight_OI, factor, scales, scheme, settings.block_size)
        return QuantizedWeight(codes_OI, scales.scale_OG, scales.zero_point_OG, codebook(scheme), scheme, scales.nested)


ENTRY = Gptq()
