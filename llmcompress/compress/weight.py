"""The one type where grid, method and format meet.

Shapes: O out_features, I in_features, G groups (I / group width).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from llmcompress.compress.scheme import WeightScheme


@dataclass(frozen=True, slots=True)
class NestedScale:
    """Scales stored in 8 bits: scale = codebook8[codes] * absmax[block] + offset (QLoRA, section 3).

    codes: uint8 [O * G], row-major. absmax: float32 [ceil(O * G / 256)]. offset: float32 scalar.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear's weight as codes on a grid.

    codes_OI: uint8, in 0 .. 2**num_bits - 1. scale_OG: float32, already snapped to what the file can hold.
    zero_point_OG: uint8 for affine grids (mid-range where symmetric), None with a codebook.
    codebook: float32 [16] or None. Columns lie in their natural order: column i belongs to group i // group width.
    nested: the 8-bit form of scale_OG where the scheme says double_quant.
    """

    codes_OI: torch.Tensor
    scale_OG: torch.Tensor
    zero_point_OG: torch.Tensor | None
    codebook: torch.Tensor | None
    scheme: WeightScheme
    nested: NestedScale | None = None

    def __post_init__(self) -> None:
        assert (self.zero_point_OG is None) != (self.codebook is None), "a zero point or a codebook, never both"

    def units(self) -> torch.Tensor:
        """What the codes mean before the scale, float32 [O, I]: code - zero point, or the codebook's entry."""
        if self.codebook is not None:
            return self.codebook[self.codes_OI.long()]
        assert self.zero_point_OG is not None
        group = self.codes_OI.shape[1] // self.scale_OG.shape[1]
        return self.codes_OI.to(torch.float32) - self.zero_point_OG.to(torch.float32).repeat_interleave(group, dim=1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [O, I] that the codes stand for, computed in float32 and rounded once to `dtype`."""
        group = self.codes_OI.shape[1] // self.scale_OG.shape[1]
        return (self.units() * self.scale_OG.repeat_interleave(group, dim=1)).to(dtype)

    def digest(self) -> str:
        """sha256 over codes, scales and zero points: equal exactly when the stored weight is equal bit for bit."""
        sha = hashlib.sha256()
        for tensor in (self.codes_OI, self.scale_OG, self.zero_point_OG):
            if tensor is not None:
                sha.update(str(tuple(tensor.shape)).encode())
                sha.update(tensor.contiguous().cpu().numpy().tobytes())
        return sha.hexdigest()
