"""Codes and scales as GGUF blocks: 32 weights of a row with one float16 scale d (ggml-common.h, ggml-quants.c).

    Q4_0   18 bytes   d, then byte j = code[j] | code[j + 16] << 4          w = d (code - 8)
    Q8_0   34 bytes   d, then 32 int8                                       w = d value

A longer group becomes several blocks with the same scale. Which blocks hold a grid exactly:

    int4 symmetric  -> Q4_0          int8 symmetric -> Q8_0 (code - 128)
    int3, int2 symmetric -> Q4_0 carrying the narrower code (code - zero point + 8): exact, in 4.5 bits a weight

Scales are float16 numbers in every integer layout of ours, so d is the scale itself.

Shapes: O out_features, I in_features, G groups, B blocks of a row (I / 32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmcompress.compress.scheme import WeightGrid
from llmcompress.compress.weight import QuantizedWeight

BLOCK = 32
Q4_ZERO, Q8_ZERO = 8, 128


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of ggml's block types. name: as ggml spells it. num_bytes: of a block. carried: whether codes are widened."""

    name: str
    num_bytes: int
    carried: bool = False


def block_type(grid: WeightGrid, in_features: int) -> BlockType | str:
    """The block that holds a grid exactly, or why none does and what to do."""
    if grid.codebook is not None:
        return f"no GGUF block holds {grid.codebook.upper()} codes: quantize with --scheme W4A16 --group-size 32"
    if not grid.symmetric:
        return (
            "no GGUF block holds an asymmetric grid exactly (Q4_1 rounds its offset to float16): quantize without "
            "--asymmetric"
        )
    group = grid.group_width(in_features)
    if group % BLOCK or in_features % BLOCK:
        return f"GGUF blocks are {BLOCK} wide, the group is {group}: quantize with --group-size 32, 64 or 128"
    if grid.num_bits == 8:
        return BlockType("Q8_0", 2 + BLOCK)
    return BlockType("Q4_0", 2 + BLOCK // 2, carried=grid.num_bits < 4)


def packed(weight: QuantizedWeight) -> torch.Tensor:
    """The blocks of a weight, row after row: uint8 [O, B * bytes of a block].

    Raises: AssertionError for a grid that `block_type` refuses, or a scale that is no float16 number.
    """
    rows, width = weight.codes_OI.shape
    kind = block_type(weight.grid, width)
    assert isinstance(kind, BlockType), kind
    scale_OG = weight.scale_OG.to(torch.float16)
    assert torch.equal(scale_OG.to(torch.float32), weight.scale_OG), "a scale that float16 does not hold"
    per_group = width // scale_OG.shape[1] // BLOCK
    scale_OB = scale_OG.repeat_interleave(per_group, dim=1).contiguous()
    value_OBi = (weight.codes_OI.to(torch.int16) - weight.grid.num_codes // 2).reshape(rows, -1, BLOCK)
    if kind.name == "Q8_0":
        data_OBi = value_OBi.to(torch.int8).view(torch.uint8)
    else:
        code_OBi = (value_OBi + Q4_ZERO).to(torch.uint8)
        data_OBi = code_OBi[..., : BLOCK // 2] | code_OBi[..., BLOCK // 2 :] << 4
    head_OB2 = scale_OB.view(torch.uint8).reshape(rows, -1, 2)
    return torch.cat((head_OB2, data_OBi), dim=-1).reshape(rows, -1)


def rounded_q8_0(weight_OI: torch.Tensor) -> torch.Tensor:
    """A dense weight rounded to Q8_0 as ggml does, uint8 [O, B * 34]: d = max |w| / 127, ties away from zero."""
    rows = len(weight_OI)
    value_OBi = weight_OI.to(torch.float32).reshape(rows, -1, BLOCK)
    scale_OB1 = value_OBi.abs().amax(dim=-1, keepdim=True) / 127
    inverse_OB1 = torch.where(scale_OB1 == 0, torch.zeros_like(scale_OB1), 1 / scale_OB1)
    scaled_OBi = value_OBi * inverse_OB1
    code_OBi = (scaled_OBi.abs() + 0.5).floor() * scaled_OBi.sign()
    head_OB2 = scale_OB1.to(torch.float16).view(torch.uint8)
    return torch.cat((head_OB2, code_OBi.to(torch.int8).view(torch.uint8)), dim=-1).reshape(rows, -1)
