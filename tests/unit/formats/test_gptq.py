"""The gptq layout against an unpacker written from the layout's definition, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from llmcompress.compress.scheme import Scheme, WeightGrid
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import Layout
from llmcompress.formats.gptq import ENTRY
from tests.grids import weights_only

SKIPPABLE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def symmetric(num_bits: int, group_size: int, rows: int = 96, columns: int = 256) -> QuantizedWeight:
    """Random codes and float16 scales."""
    scheme = weights_only(num_bits, group_size)
    generator = torch.Generator().manual_seed(num_bits)
    codes = torch.randint(0, scheme.grid.num_codes, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = torch.rand(rows, scheme.grid.num_groups(columns), generator=generator).half().float()
    return QuantizedWeight(
        codes, scale, torch.full_like(scale, scheme.grid.num_codes // 2, dtype=torch.uint8), None, scheme.grid
    )


def fields(stream: np.ndarray, num_bits: int) -> np.ndarray:
    """int32 words [n] to integers, read as one little-endian stream of bits."""
    bits = np.unpackbits(stream.astype("<i4").view(np.uint8), bitorder="little")
    return np.asarray(bits.reshape(-1, num_bits).astype(np.int64) @ (1 << np.arange(num_bits)))


def read_v1(tensors: dict[str, torch.Tensor], num_bits: int) -> np.ndarray:
    """weight [O, I] = scales[g_idx] * (q - (stored zero + 1)), straight from the definition of version 1."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    codes_OI = np.stack([fields(column, num_bits) for column in arrays["qweight"].T])
    zero_GO = np.stack([fields(row, num_bits) for row in arrays["qzeros"]]) + 1
    group = arrays["g_idx"]
    scales_IO = arrays["scales"].astype(np.float32)[group]
    weight_IO: np.ndarray = scales_IO * (codes_OI.T - zero_GO[group]).astype(np.float32)
    return weight_IO.T


def layout(schemes: dict[str, Scheme], *skipped: str, knobs: Mapping[str, Any] | None = None) -> Layout:
    """A checkpoint's description."""
    taken = {"actorder": "static", "dampening_frac": 0.01} if knobs is None else knobs
    return Layout(schemes, skipped, torch.bfloat16, "gptq", taken, "0.1.0")


def model(num_layers: int = 3, scheme: Scheme | None = None) -> dict[str, Scheme]:
    """All linears of some decoder layers, with one scheme."""
    return {f"model.layers.{i}.{name}": scheme or weights_only() for i in range(num_layers) for name in SKIPPABLE}


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_an_independent_reader_sees_the_weight(num_bits: int, group_size: int) -> None:
    weight = symmetric(num_bits, group_size)
    tensors = ENTRY.pack(weight, torch.bfloat16)
    assert np.array_equal(read_v1(tensors, num_bits), weight.dequantize().numpy())
    groups = 1 if group_size == -1 else 256 // group_size
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (256 * num_bits // 32, 96)),
        "qzeros": (torch.int32, (groups, 96 * num_bits // 32)),
        "scales": (torch.float16, (groups, 96)),
        "g_idx": (torch.int32, (256,)),
    }


@pytest.mark.parametrize(("num_bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zero_points_are_version_1s_constant_words(num_bits: int, word: int) -> None:
    assert ENTRY.pack(symmetric(num_bits, 64), torch.float16)["qzeros"].unique().tolist() == [word]


def test_a_known_word() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).repeat(32, 1)
    scale = torch.ones(32, 1)
    weight = QuantizedWeight(codes, scale, torch.full((32, 1), 8, dtype=torch.uint8), None, WeightGrid(4, 32))
    first = ENTRY.pack(weight, torch.float16)["qweight"][:2, 0]
    assert [hex(word & 0xFFFFFFFF) for word in first.tolist()] == ["0x76543210", "0xfedcba98"]


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    weight = symmetric(4, 64)
    weight.scale_OG[3, 1] = 1.0 + 2.0**-12
    with pytest.raises(LLMCompressError, match="float16, which cannot hold 1 of"):
        ENTRY.pack(weight, torch.bfloat16)
    weight.scale_OG[3, 1] = 1e6
    with pytest.raises(LLMCompressError, match="the first is 1000000"):
        ENTRY.pack(weight, torch.bfloat16)


def test_an_index_that_reorders_is_refused() -> None:
    weight = symmetric(4, 64)
    tensors = ENTRY.pack(weight, torch.float16)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(LLMCompressError, match="g_idx reorders"):
        ENTRY.unpack(tensors, Scheme(weight.grid), 96, 256)


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        (weights_only(4, 64, codebook="nf4"), (64, 128), "write bitsandbytes"),
        (weights_only(4, 64, symmetric=False), (64, 128), "zero point minus one"),
        (weights_only(3, 64), (64, 128), "refuse 3 bits"),
        (weights_only(2, 64), (64, 128), "refuse 2 bits"),
        (weights_only(4, 16), (64, 128), "group_size -1, 32, 64, 128"),
        (weights_only(4, -1), (64, 100), "in_features 100 is no multiple of 32"),
        (weights_only(4, 64), (40, 128), "out_features 40 is no multiple of 32"),
        (weights_only(4, 128), (64, 192), "128 does not divide in_features 192"),
    ],
)
def test_refusals(scheme: Scheme, shape: tuple[int, int], words: str) -> None:
    assert words in (ENTRY.refuses(scheme, *shape) or "")


def test_config_and_extra_file_are_one_object() -> None:
    described = layout(model(), "lm_head")
    config = ENTRY.quantization_config(described)
    assert json.loads(ENTRY.extra_files(described)["quantize_config.json"]) == config
    required = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq", "lm_head": False}
    assert required.items() <= config.items()
    assert config["checkpoint_format"] == config["format"] == "gptq"
    assert "modules_in_block_to_quantize" not in config
    assert config["damp_percent"] == 0.01


def test_a_method_that_does_not_damp_publishes_no_dampening() -> None:
    """rtn has no such knob; transformers takes a config without the key."""
    from transformers import GPTQConfig

    config = ENTRY.quantization_config(layout(model(), knobs={}))
    assert "damp_percent" not in config and config["static_groups"] is False
    assert GPTQConfig.from_dict(dict(config)).bits == 4


def test_transformers_takes_the_config() -> None:
    from transformers import GPTQConfig

    config = GPTQConfig.from_dict(ENTRY.quantization_config(layout(model(), "lm_head")))
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (4, 128, True, False)


def test_skipping_alike_in_every_layer_names_the_rest() -> None:
    schemes = {name: scheme for name, scheme in model().items() if not name.endswith("down_proj")}
    described = layout(schemes, "lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(3)))
    assert ENTRY.refuses_layout(described) is None
    assert ENTRY.quantization_config(described)["modules_in_block_to_quantize"] == [[name] for name in SKIPPABLE[:-1]]


def test_unequal_skipping_is_refused() -> None:
    schemes = model()
    del schemes["model.layers.1.mlp.down_proj"]
    reason = ENTRY.refuses_layout(layout(schemes, "model.layers.1.mlp.down_proj")) or ""
    assert "model.layers.1.mlp.down_proj" in reason and "in all layers or in none" in reason


def test_a_whole_layer_skipped_is_refused() -> None:
    skipped = [f"model.layers.0.{name}" for name in SKIPPABLE]
    schemes = {name: scheme for name, scheme in model().items() if name not in skipped}
    assert "model.layers.0.self_attn.q_proj" in (ENTRY.refuses_layout(layout(schemes, *skipped)) or "")


def test_layers_of_other_shapes_are_fine_while_nothing_clashes() -> None:
    scheme = weights_only()
    schemes = {"model.layers.0.mlp.up_proj": scheme, "model.layers.1.mlp.experts.0.up_proj": scheme}
    described = layout(schemes, "model.layers.1.mlp.router", "lm_head")
    assert ENTRY.refuses_layout(described) is None
    modules = ENTRY.quantization_config(described)["modules_in_block_to_quantize"]
    assert modules == [["mlp.up_proj"], ["mlp.experts.0.up_proj"]]


def test_mixed_schemes_are_refused() -> None:
    schemes = model() | {"model.layers.2.mlp.up_proj": weights_only(8, 128)}
    reason = ENTRY.refuses_layout(layout(schemes)) or ""
    assert "int4 g128 sym and int8 g128 sym" in reason and "write compressed_tensors" in reason


def test_linears_outside_the_decoder_layers_are_refused() -> None:
    assert "lm_head" in (ENTRY.refuses_layout(layout(model() | {"lm_head": weights_only()})) or "")


def test_fused_siblings_must_be_treated_alike() -> None:
    schemes = {name: scheme for name, scheme in model().items() if not name.endswith("k_proj")}
    reason = ENTRY.refuses_layout(layout(schemes, *(f"model.layers.{i}.self_attn.k_proj" for i in range(3)))) or ""
    assert "fuse q_proj, k_proj, v_proj" in reason
