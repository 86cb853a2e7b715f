"""Train a weight that may only take the values of its grid: quantization-aware distillation into adapters.

    master = base + B A            float, what the optimizer moves (B A: rank R, LoRA)
       │ nearest code on the student's own scales, which stay as they are
       v
    codes ──dequantize──> weight   what the model computes with, in training as in the file

The rounding has no gradient; it is passed by as if it were not there (straight-through, Bengio et al. 2013). So merging
is `base + B A` and requantizing is the rounding that training has already been done with: nothing is lost when the
codes are written.

`base` begins where the quantized weight is. Where the original's own nearest code is the one that was chosen, it begins
at the original itself, which knows on which side of its cell it lies; either way, the first step sees the codes of the
file.

Shapes: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from llmcompress.compress.grid import Scales, nearest_codes
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.models.blocks import is_transposed, weight_OI


def start_OI(quantized: QuantizedWeight, original_OI: torch.Tensor | None) -> torch.Tensor:
    """Where training begins, float32 [O, I]; its nearest codes are the quantized weight's own."""
    dense_OI = quantized.dequantize()
    if original_OI is None or original_OI.shape != dense_OI.shape:
        return dense_OI
    agrees_OI = codes_of(original_OI.float(), quantized) == quantized.codes_OI
    return torch.where(agrees_OI, original_OI.float(), dense_OI)


def codes_of(master_OI: torch.Tensor, quantized: QuantizedWeight) -> torch.Tensor:
    """The nearest codes of a weight on the scales of `quantized`, uint8 [O, I]."""
    scales = Scales(quantized.scale_OG, quantized.zero_point_OG, quantized.nested)
    return nearest_codes(master_OI, scales, quantized.grid)


def with_codes(quantized: QuantizedWeight, codes_OI: torch.Tensor) -> QuantizedWeight:
    """The same grid with other codes."""
    return QuantizedWeight(
        codes_OI, quantized.scale_OG, quantized.zero_point_OG, quantized.codebook, quantized.grid, quantized.nested
    )


class OnGrid(nn.Module):
    """A parametrization of a linear's weight; see the module's docstring."""

    def __init__(self, quantized: QuantizedWeight, rank: int, transposed: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.quantized, self.transposed = quantized, transposed
        rows, columns = quantized.codes_OI.shape
        first_RI = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.first_RI = nn.Parameter(first_RI)
        self.second_OR = nn.Parameter(torch.zeros(rows, rank))

    def master_OI(self, base_OI: torch.Tensor) -> torch.Tensor:
        """base + B A."""
        return base_OI + self.second_OR @ self.first_RI

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        """The weight on its grid, with the gradient of the weight before it was rounded."""
        master_OI = self.master_OI(base.t() if self.transposed else base)
        with torch.no_grad():
            rounded_OI = with_codes(self.quantized, codes_of(master_OI, self.quantized)).dequantize(master_OI.dtype)
        weight = master_OI + (rounded_OI - master_OI).detach()
        return weight.t() if self.transposed else weight


def put_on_grid(
    linear: nn.Module, quantized: QuantizedWeight, original_OI: torch.Tensor | None, rank: int,
    generator: torch.Generator,
) -> OnGrid:  # fmt: skip
    """Make a linear's weight one that is trained on its grid; only the adapter's two factors are trainable."""
    transposed = is_transposed(linear)
    base_OI = start_OI(quantized, original_OI)
    device = weight_OI(linear).device
    base = (base_OI.t().contiguous() if transposed else base_OI).to(device)
    linear._parameters["weight"] = nn.Parameter(base, requires_grad=False)
    grid = OnGrid(quantized, rank, transposed, generator).to(device)
    parametrize.register_parametrization(linear, "weight", grid, unsafe=True)
    return grid


def trained_codes(linear: nn.Module, grid: OnGrid) -> torch.Tensor:
    """The codes that training ended with, uint8 [O, I]."""
    base = linear.parametrizations["weight"].original  # type: ignore[index, union-attr]
    with torch.no_grad():
        return codes_of(grid.master_OI(base.t() if grid.transposed else base), grid.quantized)
