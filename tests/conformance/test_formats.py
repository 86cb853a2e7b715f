"""Every registered layout: what it accepts comes back from disk bit for bit, what it refuses has a reason."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.compress.grid import NF4
from llmcompress.compress.nested_scales import nest, unnest
from llmcompress.compress.scheme import PRESETS, WeightScheme
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import FORMATS, Format, Layout

SCHEMES = [
    *(WeightScheme(*grid) for grid in itertools.product((2, 3, 4, 8), (-1, 16, 32, 64, 128), (True, False))),
    PRESETS["NF4"],
    PRESETS["NF4-DQ"],
]
SHAPES = [(64, 128), (32, 384), (40, 96), (7, 30), (33, 64), (64, 33)]
CASES = [
    pytest.param(entry, scheme, id=f"{entry.name}-{scheme.label().replace(' ', '_')}")
    for entry, scheme in itertools.product(FORMATS, SCHEMES)
]
each_case = pytest.mark.parametrize(("entry", "scheme"), CASES)


def accepted(entry: Format, scheme: WeightScheme) -> list[tuple[int, int]]:
    """The shapes that this layout takes with this scheme."""
    return [shape for shape in SHAPES if entry.refuses(scheme, *shape) is None]


def random_weight(scheme: WeightScheme, rows: int, columns: int) -> QuantizedWeight:
    """Any codes on any scales that a file can hold."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randint(0, scheme.num_codes, (rows, columns), dtype=torch.uint8, generator=generator)
    shape = (rows, scheme.num_groups(columns))
    scale = (torch.rand(shape, generator=generator) + 0.01).to(torch.bfloat16).to(torch.float32)
    if scheme.codebook:
        nested = nest(scale) if scheme.double_quant else None
        return QuantizedWeight(
            codes, unnest(nested, rows) if nested else scale, None, torch.tensor(NF4), scheme, nested
        )
    zero = torch.full(shape, scheme.num_codes // 2, dtype=torch.uint8)
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.num_codes, shape, dtype=torch.uint8, generator=generator)
    return QuantizedWeight(codes, scale, zero, None, scheme)


def layout_of(scheme: WeightScheme) -> Layout:
    """A checkpoint of one quantized linear."""
    return Layout({"model.layers.0.mlp.up_proj": scheme}, ("lm_head",), torch.bfloat16, "gptq", "static", 0.01, "0.1.0")


@each_case
def test_disk_round_trip_is_bit_exact(entry: Format, scheme: WeightScheme, tmp_path: Path) -> None:
    for shape in accepted(entry, scheme):
        weight = random_weight(scheme, *shape)
        before = copy.deepcopy(weight)
        packed = {linear: entry.pack(weight, torch.bfloat16) for linear in "ab"}
        assert set(packed["a"]) == set(entry.suffixes(scheme))
        named = {f"{linear}.{name}": tensor for linear, part in packed.items() for name, tensor in part.items()}
        save_file(named, tmp_path / "model.safetensors")
        stored = load_file(tmp_path / "model.safetensors")
        back = entry.unpack({name: stored[f"a.{name}"] for name in packed["a"]}, scheme, *shape)
        assert back.digest() == weight.digest() == before.digest(), shape
        assert_same(back, weight)


def assert_same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    """Every tensor equal in dtype and bits, or absent in both."""
    assert one.scheme == other.scheme
    assert (one.nested is None) == (other.nested is None)
    pairs = [(getattr(one, f), getattr(other, f)) for f in ("codes_OI", "scale_OG", "zero_point_OG", "codebook")]
    if one.nested is not None:
        pairs += [(getattr(one.nested, f), getattr(other.nested, f)) for f in ("codes", "absmax", "offset")]
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


@each_case
def test_packed_tensors_share_nothing_with_the_weight(entry: Format, scheme: WeightScheme) -> None:
    for shape in accepted(entry, scheme)[:1]:
        weight = random_weight(scheme, *shape)
        digest, dense = weight.digest(), weight.dequantize()
        for tensor in entry.pack(weight, torch.bfloat16).values():
            assert tensor.is_contiguous()
            tensor.zero_()
        assert weight.digest() == digest
        assert torch.equal(weight.dequantize(), dense)
        assert_same(entry.unpack(entry.pack(weight, torch.bfloat16), scheme, *shape), weight)


@each_case
def test_refusals_say_why_in_one_line(entry: Format, scheme: WeightScheme) -> None:
    for shape in set(SHAPES) - set(accepted(entry, scheme)):
        reason = entry.refuses(scheme, *shape)
        assert reason
        assert "\n" not in reason
        assert any(way in reason for way in ("; write ", "; ignore ", "; choose ")), reason


@each_case
def test_a_missing_or_misshapen_tensor_is_named(entry: Format, scheme: WeightScheme) -> None:
    any_dtype = ("weight_scale", "weight.quant_state.bitsandbytes__nf4")
    for shape in accepted(entry, scheme)[:1]:
        tensors = entry.pack(random_weight(scheme, *shape), torch.bfloat16)
        for name in entry.suffixes(scheme):
            broken = [
                {key: value for key, value in tensors.items() if key != name},
                tensors | {name: tensors[name][:-1]},
                *([tensors | {name: tensors[name].to(torch.float64)}] if name not in any_dtype else []),
            ]
            for given in broken:
                with pytest.raises(LLMCompressError, match=name):
                    entry.unpack(given, scheme, *shape)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.group_size in (-1, 64, 128)], ids=WeightScheme.label)
def test_some_layout_takes_every_scheme(scheme: WeightScheme) -> None:
    assert any(entry.refuses(scheme, 64, 128) is None for entry in FORMATS)


@each_case
def test_the_config_is_json_and_repeats_itself(entry: Format, scheme: WeightScheme) -> None:
    layout = layout_of(scheme)
    assert entry.refuses_layout(layout) is None
    config = entry.quantization_config(layout)
    assert json.loads(json.dumps(config)) == config == entry.quantization_config(layout)
    assert isinstance(config["quant_method"], str)
    assert all(isinstance(text, str) for text in entry.extra_files(layout).values())


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_nothing_quantized_is_refused(entry: Format) -> None:
    reason = entry.refuses_layout(Layout({}, ("lm_head",), torch.float32, "rtn", "none", 0.0, "0.1.0"))
    assert reason and "no linear is quantized" in reason
