"""Checkpoints that hold more than a text model, or something else: what is quantized, what stays, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.dequantized import load_dequantized
from llmcompress.compress.layerwise import quantize
from llmcompress.compress.planning import header_linears
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.report import RunReport
from llmcompress.verify.check import check
from llmcompress.verify.settings import CheckSettings
from tests import architectures, tiny_models


def go(source: Path, out: Path, **settings: Any) -> RunReport:
    chosen: dict[str, Any] = {"method": "rtn", "group_size": 32, "format": ["compressed_tensors"]} | settings
    if chosen.get("scheme", "W4A16").startswith("NF4"):
        del chosen["group_size"]
    report = architectures.report()
    return quantize(
        Checkpoint.open(source), out, QuantizeSettings(**chosen), seed=0, key="", report=report, progress=Silent()
    )


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def declared(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    """A vision-language checkpoint with a head that predicts several tokens, and an image processor's file."""
    source = tmp_path / "source"
    architectures.build("qwen3_5").save_pretrained(source)
    head = {f"mtp.layers.0.mlp.{name}_proj.weight": torch.randn(64, 64) for name in ("gate", "up")}
    edit(source, lambda tensors: tensors | head | {"mtp.norm.weight": torch.ones(64)})
    (source / "preprocessor_config.json").write_text('{"size": 28}')
    return source


@pytest.mark.parametrize(("scheme", "format", "key"), [
    ("W4A16", "compressed_tensors", "ignore"), ("NF4", "bitsandbytes", "llm_int8_skip_modules"),
])  # fmt: skip
def test_of_a_wrapper_the_language_part_is_quantized_and_all_else_named(
    scheme: str, format: str, key: str, wrapper: Path, tmp_path: Path
) -> None:
    ignore = ["*.in_proj_[ab]"] if format == "bitsandbytes" else []  # four rows, which its kernel has no block for
    report = go(wrapper, tmp_path / "out", scheme=scheme, format=[format], ignore=ignore)
    done = [row.name for row in report.linears if row.outcome == "quantized"]
    assert done and all(name.startswith("model.language_model.layers.") for name in done)
    left = set(declared(tmp_path / "out")[key])
    with torch.device("meta"):
        model = architectures.model_class("qwen3_5")._from_config(architectures.config_of(wrapper))  # type: ignore[attr-defined]
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - set(done) <= left
    assert {"mtp.layers.0.mlp.gate_proj", "mtp.layers.0.mlp.up_proj"} <= left
    before, after = Checkpoint.open(wrapper), Checkpoint.open(tmp_path / "out")
    assert all(
        torch.equal(before.tensor(n), after.tensor(n)) for n in before.stored if n.startswith(("mtp.", "model.visual"))
    )
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert check(tmp_path / "out", CheckSettings(engine="transformers"))[0].loads


def test_a_tower_that_the_config_takes_for_packed_is_found_by_the_check(wrapper: Path, tmp_path: Path) -> None:
    go(wrapper, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    path.write_text(json.dumps(config))
    verdict = check(tmp_path / "out", CheckSettings(engine="transformers"))[0]
    assert verdict.loads is False and "for packed" in verdict.findings[0].detail


def test_include_narrows_and_does_not_reach_outside_the_layers(wrapper: Path, tmp_path: Path) -> None:
    report = go(wrapper, tmp_path / "out", include=["*.mlp.*"])
    assert {row.name.split(".")[-2] for row in report.linears if row.outcome == "quantized"} == {"mlp"}
    with pytest.raises(LLMCompressError, match="only those are quantized"):
        go(wrapper, tmp_path / "other", include=["model.visual.*"])


def test_an_encoder_decoder_is_refused_in_a_line_of_its_own(tmp_path: Path) -> None:
    import transformers

    shape: dict[str, Any] = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)).save_pretrained(tmp_path / "t5")
    with pytest.raises(LLMCompressError, match="T5ForConditionalGeneration is an encoder-decoder"):
        go(tmp_path / "t5", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gates_of_several_matrices_stay_with_the_reason(tmp_path: Path) -> None:
    architectures.build("recurrent_gemma").save_pretrained(tmp_path / "source")
    report = go(tmp_path / "source", tmp_path / "out")
    reasons = {row.name.rpartition(".")[2]: row.reason for row in report.linears if row.outcome == "skipped"}
    assert "several matrices in one tensor" in str(reasons["recurrent_gate_weight"])
    assert reasons["conv_1d"] == "a convolution"


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_a_plan_takes_mask_buffers_for_no_experts(name: str, tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path / "source", tiny_models.configs()[name])
    prefix = "transformer.h.0.attn" if name == "gpt2" else "gpt_neox.layers.0.attention"
    edit(source, lambda tensors: tensors | {f"{prefix}.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8)})
    assert len([linear for linear in header_linears(Checkpoint.open(source)) if linear.layer is not None]) == 8


def test_a_head_of_its_own_is_read_although_the_config_ties_it(tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path / "source", tiny_models.configs()["llama-tied"])
    head = torch.randn(96, 64, generator=torch.Generator().manual_seed(5))
    edit(source, lambda tensors: tensors | {"lm_head.weight": head})
    go(source, tmp_path / "out")
    model = load_dequantized(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, head)  # type: ignore[union-attr, arg-type]
    edit(source, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    go(source, tmp_path / "equal")
    model = load_dequantized(tmp_path / "equal")
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_nf4_of_several_dtypes_is_refused_before_any_work(tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path / "source", tiny_models.configs()["llama"], dtype=torch.bfloat16)
    edit(source, lambda tensors: {n: t.float() if "layers.1" in n else t for n, t in tensors.items()})
    with pytest.raises(LLMCompressError, match="in the dtypes of the files"):
        go(source, tmp_path / "out", scheme="NF4", format=["bitsandbytes"])
    assert not (tmp_path / "out").exists()


def test_a_linear_of_a_class_of_its_own_is_refused_where_the_quantizer_leaves_it(tmp_path: Path) -> None:
    architectures.build("falcon").save_pretrained(tmp_path / "source")
    with pytest.raises(LLMCompressError, match="does not replace") as caught:
        go(tmp_path / "source", tmp_path / "out", scheme="NF4", format=["bitsandbytes"])
    assert not (tmp_path / "out").exists() and caught.value.hint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_below_what_float16_scales_can_hold(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path / "source", tiny_models.configs()["llama"], dtype=dtype)
    edit(source, lambda tensors: {n: t * 1e-9 if "up_proj" in n else t for n, t in tensors.items()})
    report = go(source, tmp_path / "out")
    errors = {row.name: row.relative_error for row in report.linears if row.outcome == "quantized"}
    assert all(error is not None and error < 0.05 for error in errors.values()), errors
    with pytest.raises(LLMCompressError, match="the least scale that float16 holds"):
        go(source, tmp_path / "gptq", format=["gptq"])
