"""The compressed_tensors layout against the library's own decompressor and its own matching of targets."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name

from llmcompress.compress.scheme import PRESETS, Scheme
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import Layout
from llmcompress.formats.compressed_tensors import ENTRY
from llmcompress.formats.gptq import ENTRY as GPTQ
from tests.grids import weights_only

GRIDS = [(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (-1, 16, 64) for symmetric in (True, False)]


def affine(scheme: Scheme, rows: int, columns: int) -> QuantizedWeight:
    """Random codes, zero points and bfloat16 scales."""
    generator = torch.Generator().manual_seed(scheme.grid.num_bits)
    codes = torch.randint(0, scheme.grid.num_codes, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, scheme.grid.num_groups(columns), generator=generator) + 0.01).bfloat16().float()
    zero = torch.randint(0, scheme.grid.num_codes, scale.shape, dtype=torch.uint8, generator=generator)
    zero = torch.full_like(zero, scheme.grid.num_codes // 2) if scheme.grid.symmetric else zero
    return QuantizedWeight(codes, scale, zero, None, scheme.grid)


def layout(schemes: dict[str, Scheme], *skipped: str, actorder: str = "static") -> Layout:
    """A checkpoint's description."""
    return Layout(schemes, skipped, torch.bfloat16, "gptq", {"actorder": actorder}, "0.1.0")


@pytest.mark.parametrize(("num_bits", "group_size", "symmetric"), GRIDS)
@pytest.mark.parametrize("shape", [(64, 128), (40, 192), (9, 64)])
def test_the_library_decompresses_to_our_weight(
    num_bits: int, group_size: int, symmetric: bool, shape: tuple[int, int]
) -> None:
    scheme = weights_only(num_bits, group_size, symmetric)
    weight = affine(scheme, *shape)
    config = QuantizationConfig.model_validate(ENTRY.quantization_config(layout({"a.0.b": scheme})))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensors = ENTRY.pack(weight, dtype)
        assert tensors["weight_scale"].dtype == dtype
        read = compressor.decompress(tensors, config.config_groups["group_0"])["weight"]
        assert torch.equal(read, weight.dequantize(dtype)), dtype
    assert set(compressor.compression_param_names(config.config_groups["group_0"])) == set(ENTRY.suffixes(scheme))


def test_four_bit_symmetric_words_are_those_of_gptq() -> None:
    weight = affine(weights_only(4, 64), 64, 128)
    ours, theirs = ENTRY.pack(weight, torch.float16), GPTQ.pack(weight, torch.float16)
    assert torch.equal(ours["weight_packed"], theirs["qweight"].T)
    assert torch.equal(ours["weight_scale"], theirs["scales"].T)


def test_scales_that_the_dtype_cannot_hold_are_refused() -> None:
    weight = affine(weights_only(4, 64), 64, 128)
    weight.scale_OG[0, 0] = 1.0 + 2.0**-10
    ENTRY.pack(weight, torch.float16)
    with pytest.raises(LLMCompressError, match="bfloat16, which cannot hold 1 of 128"):
        ENTRY.pack(weight, torch.bfloat16)


def test_refusals() -> None:
    assert "write bitsandbytes" in (ENTRY.refuses(PRESETS["NF4"], 64, 128) or "")
    assert "100 does not divide in_features 128" in (ENTRY.refuses(weights_only(4, 100), 64, 128) or "")


def test_what_the_library_cannot_read_is_refused() -> None:
    scheme = weights_only(4, 16, symmetric=False)
    assert "more than 8" in (ENTRY.refuses(scheme, 7, 64) or "")
    config = QuantizationConfig.model_validate(ENTRY.quantization_config(layout({"a.0.b": scheme})))
    compressor = BaseCompressor.get_value_from_registry(config.format)
    with pytest.raises(RuntimeError, match="stride"):
        compressor.decompress(ENTRY.pack(affine(scheme, 7, 64), torch.float32), config.config_groups["group_0"])


def test_a_mix_with_an_asymmetric_part_is_refused() -> None:
    four, asymmetric = weights_only(4, 64), weights_only(4, 64, False)
    reason = ENTRY.refuses_layout(layout({"a.0.b": four, "a.0.c": asymmetric})) or ""
    assert "int4 g64 asym and int4 g64 sym" in reason and "; choose symmetric" in reason
    assert ENTRY.refuses_layout(layout({"a.0.b": asymmetric, "a.0.c": asymmetric})) is None
    assert ENTRY.refuses_layout(layout({"a.0.b": four, "a.0.c": weights_only(8, 64)})) is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_dense_loading_is_asked_for_only_where_transformers_needs_it(symmetric: bool) -> None:
    config = ENTRY.quantization_config(layout({"a.0.b": weights_only(4, 64, symmetric)}))
    assert ("dequantize" in config) != symmetric


def test_a_contradicting_shape_is_refused() -> None:
    weight = affine(weights_only(4, -1), 64, 126)
    tensors = ENTRY.pack(weight, torch.float32)
    with pytest.raises(LLMCompressError, match="weight_shape says"):
        ENTRY.unpack(tensors, Scheme(weight.grid), 64, 127)


def test_one_scheme_targets_the_class() -> None:
    config = ENTRY.quantization_config(layout({"model.layers.0.fc1": weights_only()}, "lm_head", "model.layers.0.fc2"))
    assert config["ignore"] == ["lm_head", "model.layers.0.fc2"]
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "actorder": "static",
            },
        }
    }


@pytest.mark.parametrize("actorder", ["static", "none"])
def test_activation_order_is_recorded_for_groups_only(actorder: str) -> None:
    def arguments(scheme: Scheme) -> dict[str, object]:
        config = ENTRY.quantization_config(layout({"a.0.b": scheme}, actorder=actorder))
        return dict(config["config_groups"]["group_0"]["weights"])

    assert ("actorder" in arguments(weights_only())) == (actorder == "static")
    assert "actorder" not in arguments(weights_only(4, -1))


def test_each_linear_of_a_mix_finds_its_own_scheme() -> None:
    four, eight, rows = weights_only(4, 64), weights_only(8, 64), weights_only(3, -1)
    schemes = {f"model.layers.{i}.mlp.{name}": four for i in range(12) for name in ("gate_proj", "up_proj")}
    schemes |= {f"model.layers.{i}.mlp.down_proj": eight for i in range(12)}
    schemes |= {f"model.layers.{i}.self_attn.o_proj": four if i else rows for i in range(12)}
    config = QuantizationConfig.model_validate(ENTRY.quantization_config(layout(schemes, "lm_head")))
    assert sum(len(group.targets) for group in config.config_groups.values()) == 3 + 12
    for name, scheme in schemes.items():
        groups = [g for g in config.config_groups.values() if any(match_name(name, target) for target in g.targets)]
        assert len(groups) == 1, name
        found = groups[0].weights
        assert (found.num_bits, found.group_size or -1, found.symmetric) == (
            scheme.grid.num_bits,
            scheme.grid.group_size,
            scheme.grid.symmetric,
        )
