"""Grids and weights on them, for the tests that run all of them through the same properties."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmcompress.compress.grid import codebook
from llmcompress.compress.nested_scales import nest, unnest
from llmcompress.compress.scheme import CODEBOOKS, Scheme, WeightGrid
from llmcompress.compress.statistics import HessianSum, Statistics, StatisticsSums
from llmcompress.compress.weight import QuantizedWeight

NF4 = CODEBOOKS["nf4"].values


def random_weight(grid: WeightGrid, rows: int, columns: int) -> QuantizedWeight:
    """Any codes on any scales that a file can hold."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randint(0, grid.num_codes, (rows, columns), dtype=torch.uint8, generator=generator)
    shape = (rows, grid.num_groups(columns))
    scale = (torch.rand(shape, generator=generator) + 0.01).to(torch.bfloat16).to(torch.float32)
    if grid.codebook:
        nested = nest(scale) if grid.double_quant else None
        return QuantizedWeight(codes, unnest(nested, rows) if nested else scale, None, codebook(grid), grid, nested)
    zero = torch.full(shape, grid.num_codes // 2, dtype=torch.uint8)
    if not grid.symmetric:
        zero = torch.randint(0, grid.num_codes, shape, dtype=torch.uint8, generator=generator)
    return QuantizedWeight(codes, scale, zero, None, grid)


def weights_only(*fields: object, **named: object) -> Scheme:
    """The scheme that changes the weights' grid and nothing else; arguments as `WeightGrid`'s."""
    return Scheme(WeightGrid(*fields, **named))  # type: ignore[arg-type]


def accumulate(inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, int]:
    """Mean of x x^T over the real tokens of all batches, and their number."""
    total = HessianSum(inputs[0].shape[-1], inputs[0].device)
    for x, mask in zip(inputs, masks, strict=True):
        total.add(x, mask)
    return total.mean()


def statistics_of(inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> Statistics:
    """What batches at hand say, some tokens held out."""
    total = StatisticsSums(inputs[0].shape[-1], inputs[0].device)
    for x, mask in zip(inputs, masks, strict=True):
        total.add(x, mask)
    return total.means()
