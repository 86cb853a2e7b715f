"""Double quantization: the float32 scales of NF4 stored in 8 bits each (QLoRA, section 3).

The mean of the scales is taken off, and the rest quantized in blocks of 256 onto the "dynamic" 8-bit map: a signed
floating format whose exponent takes as many bits as it needs and leaves the rest to the fraction (Dettmers, 8-Bit
Approximations for Parallelism in Deep Learning, 2015). About 0.127 instead of 0.5 bits per weight.
"""

from __future__ import annotations

from functools import cache

import torch

from llmcompress.compress.weight import NestedScale

BLOCK = 256


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of the signed dynamic map, ascending, float32.

    For an exponent -6 .. 0 there are 1, 2, 4 .. 64 fractions: the midpoints of equal steps over [0.1, 1]. With both
    signs that makes 254 values; 0 and 1 fill the map.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += magnitudes + [-value for value in magnitudes]
    return torch.tensor(sorted(values), dtype=torch.float32)


def nest(scale_OG: torch.Tensor) -> NestedScale:
    """The 8-bit form of `scale_OG` (float32), nearest entry of the map in each block of 256, ties to the lower."""
    flat = scale_OG.reshape(-1).to(torch.float32)
    offset = flat.mean()
    centred = flat - offset
    padding = -centred.numel() % BLOCK
    blocks = torch.nn.functional.pad(centred, (0, padding)).reshape(-1, BLOCK)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1)
    codes = torch.bucketize(scaled, _bounds()).to(torch.uint8).reshape(-1)[: flat.numel()]
    return NestedScale(codes.contiguous(), absmax, offset)


def unnest(nested: NestedScale, rows: int) -> torch.Tensor:
    """scale_OG [rows, G] float32 that the 8-bit form stands for."""
    absmax = nested.absmax.repeat_interleave(BLOCK)[: nested.codes.numel()]
    return (dynamic_map()[nested.codes.long()] * absmax + nested.offset).reshape(rows, -1)


def scales_at(nested: NestedScale, places_N: torch.Tensor) -> torch.Tensor:
    """The scales, float32 [N], that the 8-bit form stands for at flat positions `places_N`; see `unnest`."""
    return dynamic_map()[nested.codes[places_N].long()] * nested.absmax[places_N // BLOCK] + nested.offset


def nearest_codes8(nested: NestedScale, places_N: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """The 8-bit codes, uint8 [N], nearest to `scale_N` at flat positions `places_N`, in the blocks as they stand."""
    absmax_N = nested.absmax[places_N // BLOCK].clamp(min=1e-38)
    return torch.bucketize(((scale_N - nested.offset) / absmax_N).clamp(-1, 1), _bounds()).to(torch.uint8)


@cache
def _bounds() -> torch.Tensor:
    return (dynamic_map()[:-1] + dynamic_map()[1:]) / 2
