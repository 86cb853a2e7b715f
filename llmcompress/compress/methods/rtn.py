"""Round to nearest: every weight to the closest value of its group's grid, without looking at any text.

The baseline that every other method has to beat, and the only one that needs no calibration. On the NF4 grid it is
exactly what bitsandbytes does, code for code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict

from llmcompress.compress.grid import codebook, nearest_codes, plain_scales
from llmcompress.compress.nested_scales import nest, unnest
from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.weight import QuantizedWeight


class RtnSettings(BaseModel):
    """Rounding has no knobs."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Rtn:
    """Round to nearest; see the module's docstring."""

    name: str = "rtn"
    summary: str = "round to nearest, data-free"
    needs_hessian: bool = False
    settings: type[BaseModel] = RtnSettings

    def solve(
        self, weight_OI: torch.Tensor, hessian_II: torch.Tensor | None, scheme: WeightScheme, scale_dtype: torch.dtype,
        settings: BaseModel,
    ) -> QuantizedWeight:  # fmt: skip
        """Nearest codes under scales that cover each group; the Hessian is not read.

        With double quantization the codes are chosen under the exact scales, as bitsandbytes does.
        """
        scales = plain_scales(weight_OI, scheme, scale_dtype)
        codes_OI = nearest_codes(weight_OI, scales, scheme)
        scale_OG, nested = scales.scale_OG, None
        if scheme.double_quant:
            nested = nest(scale_OG)
            scale_OG = unnest(nested, weight_OI.shape[0])
        return QuantizedWeight(codes_OI, scale_OG, scales.zero_point_OG, codebook(scheme), scheme, nested)


ENTRY = Rtn()
