"""The bitsandbytes layout against bitsandbytes: its tables, its own file of the same weight, its dequantizer."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch

from llmcompress.compress.nested_scales import dynamic_map
from llmcompress.compress.scheme import PRESETS, Scheme
from llmcompress.compress.weight import NestedScale, QuantizedWeight
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import Layout
from llmcompress.formats.bitsandbytes import ENTRY
from tests.grids import NF4, weights_only

bnb: Any = importlib.import_module("bitsandbytes.functional")
STATE = "weight.quant_state.bitsandbytes__nf4"


def random_nf4(double_quant: bool, rows: int = 96, columns: int = 320) -> QuantizedWeight:
    """Codes and scales of our own choosing: no scale need be the largest entry of its block."""
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    scale, nested = torch.rand(rows, columns // 64, generator=generator), None
    if double_quant:
        byte_codes = torch.randint(0, 256, (scale.numel(),), dtype=torch.uint8, generator=generator)
        nested = NestedScale(
            byte_codes, torch.rand(-(-scale.numel() // 256), generator=generator), torch.tensor(1.5137)
        )
        stretch = nested.absmax.repeat_interleave(256)[: scale.numel()]
        scale = (dynamic_map()[byte_codes.long()] * stretch + nested.offset).reshape(scale.shape)
    grid = PRESETS["NF4-DQ" if double_quant else "NF4"].grid
    return QuantizedWeight(codes, scale, None, torch.tensor(NF4), grid, nested)


def layout(schemes: dict[str, Scheme], *skipped: str) -> Layout:
    """A checkpoint's description."""
    return Layout(schemes, skipped, torch.bfloat16, "gptq", {"actorder": "static", "dampening_frac": 0.01}, "0.1.0")


def test_the_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(NF4), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_dequantizes_to_our_weight(double_quant: bool, dtype: torch.dtype) -> None:
    weight = random_nf4(double_quant)
    tensors = ENTRY.pack(weight, dtype)
    packed = tensors.pop("weight")
    state = bnb.QuantState.from_dict({name: tensor.clone() for name, tensor in tensors.items()}, torch.device("cpu"))
    assert (state.shape, state.dtype, state.nested) == (torch.Size((96, 320)), dtype, double_quant)
    assert torch.equal(bnb.dequantize_4bit(packed, state), weight.dequantize(dtype))


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_file_is_the_one_that_bitsandbytes_writes(double_quant: bool) -> None:
    source = torch.randn(96, 320, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    packed, state = bnb.quantize_4bit(source, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    theirs = {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    scheme = PRESETS["NF4-DQ" if double_quant else "NF4"]
    weight = ENTRY.unpack(theirs, scheme, 96, 320)
    ours = ENTRY.pack(weight, torch.bfloat16)
    assert set(ours) == set(theirs) == set(ENTRY.suffixes(scheme))
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    assert torch.equal(bnb.dequantize_4bit(packed, state), weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        (weights_only(), (64, 128), "holds NF4, not int4 g128 sym"),
        (PRESETS["NF4"], (64, 352), "in_features 352 is no multiple of 64"),
        (PRESETS["NF4"], (40, 128), "out_features 40 is no multiple of 32"),
    ],
)
def test_refusals(scheme: Scheme, shape: tuple[int, int], words: str) -> None:
    assert words in (ENTRY.refuses(scheme, *shape) or "")


def test_config() -> None:
    config = ENTRY.quantization_config(layout({"model.layers.0.fc1": PRESETS["NF4-DQ"]}, "lm_head"))
    assert config == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": ["lm_head"],
    }


def test_mixed_schemes_are_refused() -> None:
    described = layout({"model.layers.0.fc1": PRESETS["NF4"], "model.layers.0.fc2": PRESETS["NF4-DQ"]})
    assert "nf4 b64 and nf4 b64 dq" in (ENTRY.refuses_layout(described) or "")


@pytest.mark.parametrize("skipped", ["up_proj", "model.layers.0", "model"])
def test_a_skipped_name_that_would_take_others_along_is_refused(skipped: str) -> None:
    reason = ENTRY.refuses_layout(layout({"model.layers.0.mlp.up_proj": PRESETS["NF4"]}, skipped)) or ""
    assert "transformers takes it for the skipped" in reason


def test_a_skipped_name_does_not_reach_past_a_boundary() -> None:
    described = layout({"model.layers.11.mlp.gate_proj": PRESETS["NF4"]}, "model.layers.1.mlp.gate", "model.layers.1")
    assert ENTRY.refuses_layout(described) is None


def test_another_codebook_in_a_file_is_refused() -> None:
    weight = random_nf4(False)
    tensors = ENTRY.pack(weight, torch.float32)
    tensors["weight.quant_map"][3] += 0.25
    with pytest.raises(LLMCompressError, match=r"weight\.quant_map is another map"):
        ENTRY.unpack(tensors, Scheme(weight.grid), 96, 320)


@pytest.mark.parametrize("change", [{"blocksize": 128}, {"quant_type": "fp4"}, {"shape": [320, 96]}])
def test_a_state_that_contradicts_the_weight_is_refused(change: dict[str, object]) -> None:
    weight = random_nf4(False)
    tensors = ENTRY.pack(weight, torch.float32)
    state = json.loads(bytes(tensors[STATE].tolist())) | change
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(LLMCompressError, match=f"does not say {next(iter(change))}"):
        ENTRY.unpack(tensors, Scheme(weight.grid), 96, 320)
