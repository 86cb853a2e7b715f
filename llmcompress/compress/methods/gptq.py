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

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmcompress.compress.methods.base import HessianSettings, MethodSettings
from llmcompress.compress.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from llmcompress.compress.methods.base import Need
    from llmcompress.compress.scheme import Part
    from llmcompress.compress.statistics import Statistics
    from llmcompress.compress.weight import QuantizedWeight


class GptqSettings(HessianSettings):
    """The knobs of GPTQ."""

    actorder: Literal["none", "static"] = Field("static", description="order of columns")
    block_size: int = Field(128, ge=1, description="columns between lazy updates")
    scale_search: bool = Field(True, description="shrink scales where that lowers the weighted error")


class Gptq:
    """GPTQ on any grid; see the module's docstring."""

    name = "gptq"
    summary = "error feedback through the Hessian of calibration text, scales searched for"
    needs: frozenset[Need] = frozenset({"hessian"})
    makes: frozenset[Part] = frozenset({"weights"})
    rows_independent = True
    settings: type[MethodSettings] = GptqSettings

    def solve(
        self, weight_OI: torch.Tensor, seen: Statistics | None, scheme: Scheme, scale_dtype: torch.dtype,
        settings: MethodSettings,
    ) -> QuantizedWeight:  # fmt: skip
        """Codes that minimise the output error on the calibration text, column by column.

        weight_OI and the Hessian share a dtype, float32 or float64, which is the one computed in.
        Raises: LLMCompressError for a Hessian that is zero, not finite or singular.
        """
        import torch

        from llmcompress.compress.grid import codebook, nested, plain_scales
        from llmcompress.compress.solvers.codes import gptq_codes
        from llmcompress.compress.solvers.factor import factorise
        from llmcompress.compress.solvers.scale_search import searched_scales
        from llmcompress.compress.statistics import damping
        from llmcompress.compress.weight import QuantizedWeight

        assert isinstance(settings, GptqSettings) and seen is not None
        grid, hessian_II = scheme.grid, seen.hessian_II
        order_I = torch.arange(len(hessian_II), device=hessian_II.device)
        if settings.actorder == "static":
            order_I = torch.argsort(hessian_II.diagonal(), descending=True, stable=True)
        factor = factorise(hessian_II, order_I, damping(hessian_II, settings.dampening_frac))
        if settings.scale_search:
            scales = searched_scales(weight_OI, factor.importance_I.to(weight_OI.device), grid, scale_dtype)
        else:
            scales = plain_scales(weight_OI, grid, scale_dtype)
        scales = nested(scales, grid)
        codes_OI = gptq_codes(weight_OI, factor, scales, grid, settings.block_size)
        return QuantizedWeight(codes_OI, scales.scale_OG, scales.zero_point_OG, codebook(grid), grid, scales.nested)


ENTRY = Gptq()
