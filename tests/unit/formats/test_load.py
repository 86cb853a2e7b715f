"""Whole checkpoints that plain transformers loads: the logits are those of a dense model with dequantized weights."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.compress.nested_scales import nest, unnest
from llmcompress.compress.scheme import PRESETS, Scheme
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.formats.base import FORMATS, Layout
from tests.grids import NF4, weights_only

TOKENS = torch.arange(24).reshape(2, 12)


def tiny_llama(dtype: torch.dtype, tied: bool = False) -> Any:
    """A random Llama: hidden 128, two layers, grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # and not the rotary buffers, which transformers keeps in float32
        parameter.data = parameter.data.to(dtype)
    return model


def rounded(weight_OI: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round to nearest, the plainest way."""
    rows, columns = weight_OI.shape
    blocks = weight_OI.float().reshape(rows, scheme.grid.num_groups(columns), -1)
    if scheme.grid.codebook:
        scale = blocks.abs().amax(-1)
        nested = nest(scale) if scheme.grid.double_quant else None
        scale = unnest(nested, rows) if nested else scale
        distance = (blocks / scale.unsqueeze(-1)).unsqueeze(-1) - torch.tensor(NF4)
        codes = distance.abs().argmin(-1).to(torch.uint8).reshape(rows, columns)
        return QuantizedWeight(codes, scale, None, torch.tensor(NF4), scheme.grid, nested)
    low, high = (blocks.amin(-1), blocks.amax(-1)) if not scheme.grid.symmetric else (None, blocks.abs().amax(-1))
    width = high - low if low is not None else 2 * high
    scale = (width / (scheme.grid.num_codes - 1)).to(torch.bfloat16).float()
    zero = torch.full_like(scale, scheme.grid.num_codes // 2) if low is None else (-low / scale).round()
    zero = zero.clamp(0, scheme.grid.num_codes - 1)
    codes = ((blocks / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, scheme.grid.num_codes - 1)
    return QuantizedWeight(codes.to(torch.uint8).reshape(rows, columns), scale, zero.to(torch.uint8), None, scheme.grid)


def write(
    folder: Path,
    model: Any,
    name: str,
    schemes: Mapping[str, Scheme],
    skipped: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    """Write the checkpoint by hand, and put the dequantized weights into `model`."""
    entry = FORMATS.get(name)
    layout = Layout(schemes, skipped, dtype, "rtn", {}, "0.1.0")
    assert entry.refuses_layout(layout) is None
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for path, scheme in schemes.items():
        source = tensors.pop(f"{path}.weight")
        assert entry.refuses(scheme, *source.shape) is None
        weight = rounded(source, scheme)
        tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in entry.pack(weight, dtype).items()}
        model.get_submodule(path).weight.data = weight.dequantize(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": entry.quantization_config(layout)}
    (folder / "config.json").write_text(json.dumps(config))
    for file, text in entry.extra_files(layout).items():
        (folder / file).write_text(text)


def linears(model: Any) -> list[str]:
    """Paths of all linears."""
    return [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def load_and_compare(folder: Path, model: Any, dtype: torch.dtype, tolerance: float) -> Any:
    """Load with transformers, nothing missing or unexpected, and compare logits by their largest relative error."""
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    loaded, info = opened
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    with torch.no_grad():
        expected, got = model(TOKENS).logits.float(), loaded(TOKENS).logits.float()
    error = (expected - got).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [
        weights_only(4, 128),
        weights_only(4, 32, False),
        weights_only(3, 64),
        weights_only(3, -1, False),
        weights_only(2, 32, False),
        weights_only(8, -1),
        weights_only(8, 64, False),
    ],
    ids=Scheme.label,
)
def test_compressed_tensors_loads(scheme: Scheme, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llama(dtype, tied)
    schemes = {path: scheme for path in linears(model) if path != "lm_head"}
    write(tmp_path, model, "compressed_tensors", schemes, ("lm_head",), dtype)
    load_and_compare(tmp_path, model, dtype, 0.0)


def test_compressed_tensors_loads_a_mix(tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    skipped = ("lm_head", "model.layers.1.mlp.down_proj")
    schemes = {path: weights_only(4, 64) for path in linears(model) if path not in skipped}
    schemes |= {path: weights_only(8, -1) for path in schemes if path.endswith(("v_proj", "o_proj"))}
    schemes["model.layers.0.mlp.up_proj"] = weights_only(3, 32)
    write(tmp_path, model, "compressed_tensors", schemes, skipped, torch.float32)
    load_and_compare(tmp_path, model, torch.float32, 0.0)


@pytest.mark.parametrize("scheme", ["NF4", "NF4-DQ"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_bitsandbytes_loads(scheme: str, tied: bool, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    bnb: Any = importlib.import_module("bitsandbytes")
    model = tiny_llama(dtype, tied)
    skipped = ("lm_head", "model.layers.1.mlp.gate_proj")
    schemes = {path: PRESETS[scheme] for path in linears(model) if path not in skipped}
    write(tmp_path, model, "bitsandbytes", schemes, skipped, dtype)
    if bnb.functional.has_avx512bf16():  # there bitsandbytes computes in bfloat16, its scales included
        tolerance = 5e-2
    loaded = load_and_compare(tmp_path, model, dtype, tolerance)
    kinds = {path: type(module) for path, module in loaded.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {path for path, kind in kinds.items() if kind is bnb.nn.Linear4bit} == set(schemes)
    assert loaded.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.uint8
