"""Every registered layout: what it accepts comes back from disk bit for bit, what it refuses has a reason."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.checkpoint.safetensors import read_header
from llmcompress.compress.scheme import PRESETS, ActivationGrid, Scheme, WeightGrid
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import FORMATS, Format, Layout, by_quant_method, default_format
from tests.grids import random_weight, weights_only

SCHEMES = [
    *(weights_only(*grid) for grid in itertools.product((2, 3, 4, 8), (-1, 16, 32, 64, 128), (True, False))),
    *(scheme for scheme in PRESETS.values() if scheme.grid.codebook),
]
UNSERVED = [
    Scheme(WeightGrid(8, -1), ActivationGrid()),
    Scheme(WeightGrid(4, 64), sparsity="2:4"),
    Scheme(sparsity=0.5),
    Scheme(rank=8),
]
SHAPES = [(64, 128), (32, 384), (40, 96), (7, 30), (33, 64), (64, 33)]
CASES = [
    pytest.param(entry, scheme, id=f"{entry.name}-{scheme.label().replace(' ', '_')}")
    for entry, scheme in itertools.product(FORMATS, SCHEMES)
]
each_case = pytest.mark.parametrize(("entry", "scheme"), CASES)


def accepted(entry: Format, scheme: Scheme) -> list[tuple[int, int]]:
    """The shapes that this layout takes with this scheme."""
    return [shape for shape in SHAPES if entry.refuses(scheme, *shape) is None]


def layout_of(scheme: Scheme) -> Layout:
    """A checkpoint of one quantized linear."""
    return Layout({"model.layers.0.mlp.up_proj": scheme}, ("lm_head",), torch.bfloat16, "rtn", {}, "0.1.0")


@each_case
def test_disk_round_trip_is_bit_exact(entry: Format, scheme: Scheme, tmp_path: Path) -> None:
    for shape in accepted(entry, scheme):
        weight = random_weight(scheme.grid, *shape)
        before = copy.deepcopy(weight)
        packed = {linear: entry.pack(weight, torch.bfloat16) for linear in "ab"}
        assert set(packed["a"]) == set(entry.suffixes(scheme))
        named = {f"{linear}.{name}": tensor for linear, part in packed.items() for name, tensor in part.items()}
        save_file(named, tmp_path / "model.safetensors")
        stored = load_file(tmp_path / "model.safetensors")
        back = entry.unpack({name: stored[f"a.{name}"] for name in packed["a"]}, scheme, *shape)
        assert back.digest() == weight.digest() == before.digest(), shape
        assert isinstance(back, QuantizedWeight)
        assert_same(back, weight)


def assert_same(one: QuantizedWeight, other: QuantizedWeight) -> None:
    """Every tensor equal in dtype and bits, or absent in both."""
    assert one.grid == other.grid
    assert (one.nested is None) == (other.nested is None)
    pairs = [(getattr(one, f), getattr(other, f)) for f in ("codes_OI", "scale_OG", "zero_point_OG", "codebook")]
    if one.nested is not None:
        pairs += [(getattr(one.nested, f), getattr(other.nested, f)) for f in ("codes", "absmax", "offset")]
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


@each_case
def test_packed_tensors_share_nothing_with_the_weight(entry: Format, scheme: Scheme) -> None:
    for shape in accepted(entry, scheme)[:1]:
        weight = random_weight(scheme.grid, *shape)
        digest, dense = weight.digest(), weight.dequantize()
        for tensor in entry.pack(weight, torch.bfloat16).values():
            assert tensor.is_contiguous()
            tensor.zero_()
        assert weight.digest() == digest
        assert torch.equal(weight.dequantize(), dense)
        back = entry.unpack(entry.pack(weight, torch.bfloat16), scheme, *shape)
        assert isinstance(back, QuantizedWeight)
        assert_same(back, weight)


@each_case
def test_refusals_say_why_in_one_line(entry: Format, scheme: Scheme) -> None:
    for shape in set(SHAPES) - set(accepted(entry, scheme)):
        reason = entry.refuses(scheme, *shape)
        assert reason
        assert "\n" not in reason
        assert any(way in reason for way in ("; write ", "; ignore ", "; choose ")), reason


@each_case
def test_a_missing_or_misshapen_tensor_is_named(entry: Format, scheme: Scheme) -> None:
    any_dtype = ("weight_scale", "weight.quant_state.bitsandbytes__nf4")
    for shape in accepted(entry, scheme)[:1]:
        tensors = entry.pack(random_weight(scheme.grid, *shape), torch.bfloat16)
        for name in entry.suffixes(scheme):
            broken = [
                {key: value for key, value in tensors.items() if key != name},
                tensors | {name: tensors[name][:-1]},
                *([tensors | {name: tensors[name].to(torch.float64)}] if name not in any_dtype else []),
            ]
            for given in broken:
                with pytest.raises(LLMCompressError, match=name):
                    entry.unpack(given, scheme, *shape)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.grid.group_size in (-1, 64, 128)], ids=Scheme.label)
def test_some_layout_takes_every_scheme(scheme: Scheme) -> None:
    assert any(entry.refuses(scheme, 64, 128) is None for entry in FORMATS)


@each_case
def test_the_config_is_json_and_repeats_itself(entry: Format, scheme: Scheme) -> None:
    layout = layout_of(scheme)
    assert entry.refuses_layout(layout) is None
    config = entry.quantization_config(layout)
    assert json.loads(json.dumps(config)) == config == entry.quantization_config(layout)
    assert isinstance(config["quant_method"], str)
    assert all(isinstance(text, str) for text in entry.extra_files(layout).values())


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_nothing_quantized_is_refused(entry: Format) -> None:
    reason = entry.refuses_layout(Layout({}, ("lm_head",), torch.float32, "rtn", {}, "0.1.0"))
    assert reason and "no linear is quantized" in reason


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_planned_size_is_that_of_the_tensors(entry: Format, scheme: Scheme, dtype: torch.dtype) -> None:
    """To the byte, but for the few of bitsandbytes' JSON; and never below what the values alone take."""
    name = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    for shape in accepted(entry, scheme):
        weight = random_weight(scheme.grid, *shape)
        written = sum(tensor.nbytes for tensor in entry.pack(weight, dtype).values())
        slack = 24 if entry.name == "bitsandbytes" else 0
        assert abs(entry.packed_bytes(scheme, *shape, name) - written) <= slack, shape
        assert weight.num_bytes <= written, shape


@each_case
def test_a_header_shows_what_was_packed(entry: Format, scheme: Scheme, tmp_path: Path) -> None:
    """The marker is there, and tells the shape wherever the declared grid allows it."""
    declared = entry.declared(entry.quantization_config(layout_of(scheme)))
    for shape in accepted(entry, scheme):
        save_file(entry.pack(random_weight(scheme.grid, *shape), torch.bfloat16), tmp_path / "a.safetensors")
        marker = read_header(tmp_path / "a.safetensors")[entry.marker]
        found = entry.packed_shape(marker, declared)
        if entry.name == "bitsandbytes" or (32 % scheme.grid.num_bits == 0 and shape[1] % 32 == 0):
            assert found == tuple(shape)
        assert found is None or found[0] == shape[0], "the width is rounded up to whole words"


@each_case
def test_the_config_declares_the_grid_that_was_written(entry: Format, scheme: Scheme) -> None:
    if not accepted(entry, scheme):
        return
    for declared in entry.declared(entry.quantization_config(layout_of(scheme))):
        grid = scheme.grid
        assert (declared.num_bits, declared.symmetric) == (grid.num_bits, grid.symmetric)
        assert declared.group_size in (grid.group_size, None)


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("scheme", UNSERVED, ids=Scheme.label)
def test_what_no_layout_holds_is_refused_by_name(entry: Format, scheme: Scheme) -> None:
    extra = sorted(scheme.parts - {"weights"})[0]
    reason = entry.refuses(scheme, 64, 128) or ""
    assert entry.name in reason and f"not {extra}" in reason and "choose" in reason
    assert not entry.is_default_for(scheme)
    with pytest.raises(LLMCompressError, match="no layout holds it"):
        default_format(scheme)


@pytest.mark.parametrize("scheme", [*PRESETS.values(), weights_only(4, 64, False)], ids=Scheme.label)
def test_every_preset_has_one_default_layout_and_it_takes_it(scheme: Scheme) -> None:
    defaults = [entry for entry in FORMATS if entry.is_default_for(scheme)]
    assert len(defaults) == 1 and default_format(scheme) is defaults[0]
    assert defaults[0].refuses(scheme, 4096, 4096) is None


def test_integers_go_to_compressed_tensors_and_nf4_to_bitsandbytes() -> None:
    names = {name: default_format(scheme).name for name, scheme in PRESETS.items()}
    assert names["NF4"] == names["NF4-DQ"] == "bitsandbytes"
    assert all(names[name] == "compressed_tensors" for name, scheme in PRESETS.items() if not scheme.grid.codebook)


def test_every_layout_is_told_apart() -> None:
    entries = list(FORMATS)
    for one, other in itertools.combinations(entries, 2):
        assert one.quant_method != other.quant_method and one.marker != other.marker
    for entry in entries:
        assert by_quant_method(entry.quant_method) is entry and entry.packages and entry.kernels and entry.readers
    assert by_quant_method("awq") is None


def test_layouts_and_methods_are_known_without_torch() -> None:
    code = """
import sys
from llmcompress.compress.methods.base import METHODS
from llmcompress.formats.base import FORMATS
from llmcompress.compress.scheme import PRESETS
for entry in FORMATS:
    for scheme in PRESETS.values():
        entry.is_default_for(scheme), entry.refuses(scheme, 64, 128), entry.packed_bytes(scheme, 64, 128, "BF16")
print(METHODS.names(), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False"), done.stdout
