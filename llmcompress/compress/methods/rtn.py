"""Round to nearest: every weight to the closest value of its group's grid, without looking at any text.

The baseline that every other method has to beat, and the only one that needs no calibration. On the NF4 grid it is
exactly what bitsandbytes does, code for code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompress.compress.methods.base import MethodSettings
from llmcompress.compress.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from llmcompress.compress.methods.base import Need
    from llmcompress.compress.scheme import Part
    from llmcompress.compress.statistics import Statistics
    from llmcompress.compress.weight import QuantizedWeight


class Rtn:
    """Round to nearest; see the module's docstring."""

    name = "rtn"
    summary = "round to nearest, data-free"
    needs: frozenset[Need] = frozenset()
    makes: frozenset[Part] = frozenset({"weights"})
    rows_independent = True
    settings: type[MethodSettings] = MethodSettings

    def solve(
        self, weight_OI: torch.Tensor, seen: Statistics | None, scheme: Scheme, scale_dtype: torch.dtype,
        settings: MethodSettings,
    ) -> QuantizedWeight:  # fmt: skip
        """Nearest codes under scales that cover each group; no statistics are read.

        With double quantization the codes are chosen under the exact scales, as bitsandbytes does.
        """
        from llmcompress.compress.grid import codebook, nearest_codes, nested, plain_scales
        from llmcompress.compress.weight import QuantizedWeight

        grid = scheme.grid
        scales = plain_scales(weight_OI, grid, scale_dtype)
        codes_OI = nearest_codes(weight_OI, scales, grid)
        scales = nested(scales, grid)
        return QuantizedWeight(codes_OI, scales.scale_OG, scales.zero_point_OG, codebook(grid), grid, scales.nested)


ENTRY = Rtn()
