"""Round to nearest against bitsandbytes (NF4) and a plain formula (affine)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.compress.methods.rtn import ENTRY
from llmcompress.compress.nested_scales import dynamic_map
from llmcompress.compress.scheme import PRESETS
from tests.grids import weights_only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["NF4", "NF4-DQ"])
def test_nf4_equals_bitsandbytes_code_for_code(preset: str, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3, 64:128] = 0
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=preset == "NF4-DQ"
    )
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).reshape(96, 256)
    ours = ENTRY.solve(weight.float(), None, PRESETS[preset], dtype, ENTRY.settings())
    assert torch.equal(ours.codes_OI, theirs)
    if preset == "NF4":
        assert torch.equal(ours.scale_OG.flatten(), state.absmax)
    else:
        assert ours.nested is not None
        assert torch.equal(ours.nested.absmax, state.state2.absmax)
        assert torch.equal(ours.nested.offset, state.offset)
        step = (ours.nested.codes.int() - state.absmax.int()).abs()
        assert int(step.max()) <= 1 and float((step > 0).double().mean()) < 0.01, "only exact ties may differ"
    dense = functional.dequantize_4bit(packed, state).float()
    exact = {"rtol": 0, "atol": 0} if preset == "NF4" else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(ours.dequantize(dtype).float(), dense, **exact)


def test_the_dynamic_map_is_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 40, -1])
def test_affine_grids_follow_the_formula(num_bits: int, group_size: int, symmetric: bool) -> None:
    weight = torch.randn(6, 160, generator=torch.Generator().manual_seed(1)) * 0.3
    scheme = weights_only(num_bits, group_size, symmetric)
    solved = ENTRY.solve(weight, None, scheme, torch.float32, ENTRY.settings())
    top, width = 2**num_bits - 1, scheme.grid.group_width(160)
    for o, g in np.ndindex(6, 160 // width):
        group = weight[o, g * width : (g + 1) * width].double().numpy()
        low, high = (
            (-np.abs(group).max(), np.abs(group).max()) if symmetric else (min(group.min(), 0), max(group.max(), 0))
        )
        scale = float(np.float16(np.float32(high - low) / np.float32(top)))
        zero = 2 ** (num_bits - 1) if symmetric else round(-low / scale)
        assert float(solved.scale_OG[o, g]) == pytest.approx(scale, rel=2e-3)
        assert solved.zero_point_OG is not None and int(solved.zero_point_OG[o, g]) == zero
        stored = float(solved.scale_OG[o, g])
        codes = np.clip(np.round(group.astype(np.float32) / np.float32(stored)) + zero, 0, top)
        assert np.array_equal(solved.codes_OI[o, g * width : (g + 1) * width].numpy(), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_survive_every_layout_that_stores_them(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-9, 3, 8).unsqueeze(1)
    scale = ENTRY.solve(weight, None, weights_only(4, 32), dtype, ENTRY.settings()).scale_OG
    assert torch.equal(scale.to(torch.float16).float(), scale)
    assert torch.equal(scale.to(dtype).float(), scale)
    assert bool((scale > 0).all())
