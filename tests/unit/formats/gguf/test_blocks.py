"""GGUF blocks against the format's own library: what it dequantizes is what our codes stand for, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.compress.methods.base import METHODS
from llmcompress.compress.scheme import preset
from llmcompress.formats.gguf.blocks import block_type, packed, rounded_q8_0

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")


def solved(scheme: str, group_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    weight_OI = torch.randn(12, 128, generator=torch.Generator().manual_seed(seed))
    rtn = METHODS.get("rtn")
    return rtn.solve(weight_OI, None, preset(scheme, group_size=group_size), dtype, rtn.settings())


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16", "W4A16", "W8A16"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_librarys_dequantizer_gives_our_values(scheme: str, group_size: int, dtype: torch.dtype) -> None:
    weight = solved(scheme, group_size, dtype)
    kind = block_type(weight.grid, 128)
    data = packed(weight)
    assert data.shape == (12, 128 // 32 * kind.num_bytes)
    found = quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind.name])
    assert np.array_equal(found, weight.dequantize().numpy())
    assert kind.carried is (scheme in ("W2A16", "W3A16"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "NF4"}, "no GGUF block holds NF4"),
        ({"name": "W4A16", "symmetric": False, "group_size": 32}, "asymmetric"),
        ({"name": "W4A16", "group_size": 48}, "blocks are 32 wide, the group is 48"),
        ({"name": "W4A16", "group_size": 16}, "blocks are 32 wide, the group is 16"),
    ],
)
def test_a_grid_that_no_block_holds_is_refused_with_the_way_out(changes: dict[str, object], reason: str) -> None:
    refused = block_type(preset(**changes).grid, 96)  # type: ignore[arg-type]
    assert isinstance(refused, str) and reason in refused and "--" in refused


def test_rounding_to_q8_0_is_the_librarys() -> None:
    weight_OI = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    weight_OI[0, :32] = 0
    theirs = quants.quantize(weight_OI.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(rounded_q8_0(weight_OI).numpy(), theirs)
