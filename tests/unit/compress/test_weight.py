"""Every kind of compressed weight against plain arithmetic, and its digest against what may and may not change it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmcompress.compress.scheme import PRESETS, WeightGrid
from llmcompress.compress.stacking import joined, split
from llmcompress.compress.weight import CompressedWeight, DenseWeight, LowRankWeight, QuantizedWeight, SumWeight
from tests.grids import random_weight

GRIDS = [*(scheme.grid for scheme in PRESETS.values()), WeightGrid(4, 32, False), WeightGrid(3, -1)]
ROWS, COLUMNS = 32, 128


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def kinds() -> list[CompressedWeight]:
    quantized = random_weight(WeightGrid(4, 32), ROWS, COLUMNS)
    low_rank = LowRankWeight(drawn(ROWS, 4), drawn(4, COLUMNS))
    mask = drawn(ROWS, COLUMNS) > 0
    return [
        DenseWeight(drawn(ROWS, COLUMNS)), DenseWeight(drawn(ROWS, COLUMNS), mask), quantized,
        replace(quantized, mask_OI=mask), low_rank, SumWeight((quantized, low_rank)),
    ]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=WeightGrid.label)
def test_codes_mean_scale_times_level_element_by_element(grid: WeightGrid) -> None:
    weight = random_weight(grid, ROWS, COLUMNS)
    codes, scale = weight.codes_OI.numpy(), weight.scale_OG.numpy()
    expected = np.empty((ROWS, COLUMNS), np.float32)
    for o in range(ROWS):
        for i in range(COLUMNS):
            g = i // grid.group_width(COLUMNS)
            level = grid.values[codes[o, i]] if grid.values else float(codes[o, i]) - weight.zero_point_OG[o, g].item()  # type: ignore[index]
            expected[o, i] = np.float32(np.float32(level) * scale[o, g])
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=WeightGrid.label)
def test_the_digest_of_codes_is_that_of_earlier_releases(grid: WeightGrid) -> None:
    """Reports already published hold it: shape and bytes of codes, scales and zero points, one after the other."""
    weight = random_weight(grid, ROWS, COLUMNS)
    sha = hashlib.sha256()
    for tensor in (weight.codes_OI, weight.scale_OG, weight.zero_point_OG):
        if tensor is not None:
            sha.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    assert weight.digest() == sha.hexdigest()


def test_other_kinds_by_numpy() -> None:
    dense, pruned, quantized, masked, low_rank, total = kinds()
    assert isinstance(dense, DenseWeight) and isinstance(pruned, DenseWeight) and isinstance(low_rank, LowRankWeight)
    assert isinstance(masked, QuantizedWeight) and pruned.mask_OI is not None and masked.mask_OI is not None
    np.testing.assert_array_equal(dense.dequantize().numpy(), dense.weight_OI.numpy())
    np.testing.assert_array_equal(
        pruned.dequantize().numpy(), np.where(pruned.mask_OI.numpy(), pruned.weight_OI.numpy(), 0)
    )
    np.testing.assert_array_equal(
        masked.dequantize().numpy(), np.where(masked.mask_OI.numpy(), quantized.dequantize().numpy(), 0)
    )
    product = low_rank.up_OR.double().numpy() @ low_rank.down_RI.double().numpy()
    np.testing.assert_allclose(low_rank.dequantize().numpy(), product, rtol=0, atol=1e-5)
    np.testing.assert_allclose(total.dequantize().numpy(), quantized.dequantize().numpy() + product, rtol=0, atol=1e-5)
    assert (
        total.num_bytes == quantized.num_bytes + low_rank.num_bytes == 32 * 128 // 2 + 2 * 32 * 4 + 4 * 4 * (32 + 128)
    )


@pytest.mark.parametrize("weight", kinds(), ids=lambda weight: type(weight).__name__)
def test_what_every_kind_promises(weight: CompressedWeight) -> None:
    before = weight.dequantize()
    assert before.shape == (ROWS, COLUMNS) and before.dtype == torch.float32
    assert torch.equal(weight.dequantize(torch.bfloat16), before.to(torch.bfloat16))
    before.zero_()
    assert weight.num_bytes > 0 and weight.digest() == weight.digest()


def test_digests_differ_where_a_weight_does() -> None:
    digests = [weight.digest() for weight in kinds()]
    assert len(set(digests)) == len(digests)
    dense = kinds()[0]
    assert isinstance(dense, DenseWeight)
    assert DenseWeight(dense.weight_OI.double()).digest() != dense.digest()
    assert DenseWeight(dense.weight_OI, torch.ones(ROWS, COLUMNS, dtype=torch.bool)).digest() == dense.digest()


@pytest.mark.parametrize("weight", kinds()[:4], ids=lambda weight: type(weight).__name__)
def test_rows_split_and_joined_are_the_weight(weight: CompressedWeight) -> None:
    parts = split(weight, [5, 20, 7])
    assert [len(part.dequantize()) for part in parts] == [5, 20, 7]
    assert joined(parts).digest() == weight.digest()


def test_kinds_without_rows_of_their_own_are_not_split() -> None:
    with pytest.raises(AssertionError, match="LowRankWeight has no rows of its own"):
        split(kinds()[4], [16, 16])
