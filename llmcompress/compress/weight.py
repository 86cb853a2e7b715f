"""A linear's new weight, the one type where scheme, method and format meet: a union of kinds, without a base class.

    DenseWeight       values as they are, some of them zero
    QuantizedWeight   codes on a grid, scales per group
    LowRankWeight     up @ down, thinner than the weight
    SumWeight         some of these added up, e.g. codes plus a low-rank correction of their error

Each kind gives `dequantize(dtype)`, the weight [O, I] that a model would compute with; `num_bytes`, what its values
take at least, whatever the layout adds; and `digest()`, equal exactly when two stored weights are equal bit for bit.

Shapes: O out_features, I in_features, G groups (I / group width), R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llmcompress.compress.scheme import WeightGrid


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """Values as they are. mask_OI: bool, False where the weight was pruned; None where nothing was."""

    weight_OI: torch.Tensor
    mask_OI: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [O, I] in `dtype`, zero where pruned."""
        return _masked(self.weight_OI, self.mask_OI).to(dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all its values: zeros are stored like others."""
        return self.weight_OI.nbytes

    def digest(self) -> str:
        """sha256 over the values (pruned ones as zeros), their dtype and shape."""
        return _digest([_masked(self.weight_OI, self.mask_OI)], f"dense {self.weight_OI.dtype}")


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
    """A weight as codes on a grid.

    codes_OI: uint8, in 0 .. 2**num_bits - 1. scale_OG: float32, already snapped to what the file can hold.
    zero_point_OG: uint8 for affine grids (mid-range where symmetric), None with a codebook.
    codebook: float32 [2**num_bits] or None. Columns lie in their natural order: column i belongs to group i // group
    width. nested: the 8-bit form of scale_OG where the grid says double_quant. mask_OI: bool, False where pruned.
    """

    codes_OI: torch.Tensor
    scale_OG: torch.Tensor
    zero_point_OG: torch.Tensor | None
    codebook: torch.Tensor | None
    grid: WeightGrid
    nested: NestedScale | None = None
    mask_OI: torch.Tensor | None = None

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
        return _masked(self.units() * self.scale_OG.repeat_interleave(group, dim=1), self.mask_OI).to(dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales (16 bits each on an affine grid, 32 on a codebook's) and zero points of their own."""
        bits = self.codes_OI.numel() * self.grid.num_bits
        if self.nested is not None:
            bits += 8 * (self.nested.codes.nbytes + self.nested.absmax.nbytes + self.nested.offset.nbytes)
        else:
            bits += self.scale_OG.numel() * (32 if self.codebook is not None else 16)
        if self.zero_point_OG is not None and not self.grid.symmetric:
            bits += self.zero_point_OG.numel() * self.grid.num_bits
        return -(-bits // 8)

    def digest(self) -> str:
        """sha256 over codes, scales, zero points and mask."""
        parts = (self.codes_OI, self.scale_OG, self.zero_point_OG, self.mask_OI)
        return _digest(tensor for tensor in parts if tensor is not None)


@dataclass(frozen=True, slots=True)
class LowRankWeight:
    """up_OR @ down_RI: the linear as two thin ones, the second reading what the first gives."""

    up_OR: torch.Tensor
    down_RI: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The product [O, I], computed in float32 and rounded once to `dtype`."""
        return (self.up_OR.to(torch.float32) @ self.down_RI.to(torch.float32)).to(dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of both factors."""
        return self.up_OR.nbytes + self.down_RI.nbytes

    def digest(self) -> str:
        """sha256 over both factors, their dtypes and shapes."""
        return _digest([self.up_OR, self.down_RI], f"low rank {self.up_OR.dtype} {self.down_RI.dtype}")


@dataclass(frozen=True, slots=True)
class SumWeight:
    """The sum of its parts, which have one shape."""

    parts: tuple[CompressedWeight, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The sum [O, I], computed in float32 and rounded once to `dtype`."""
        total_OI = self.parts[0].dequantize().clone()
        for part in self.parts[1:]:
            total_OI += part.dequantize()
        return total_OI.to(dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self.parts)

    def digest(self) -> str:
        """sha256 over the parts' digests, in order."""
        return hashlib.sha256(" ".join(part.digest() for part in self.parts).encode()).hexdigest()


CompressedWeight = DenseWeight | QuantizedWeight | LowRankWeight | SumWeight


def _masked(value_OI: torch.Tensor, mask_OI: torch.Tensor | None) -> torch.Tensor:
    return value_OI if mask_OI is None else value_OI * mask_OI


def _digest(tensors: Iterable[torch.Tensor], kind: str = "") -> str:
    """sha256 over shapes and bytes, after the name of the kind; codes on a grid, the first kind, have none."""
    sha = hashlib.sha256(kind.encode())
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
