"""A checkpoint as a GGUF file: everything that went in comes out of the format's own reader."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.formats.gguf import export as exporting
from llmcompress.formats.gguf.export import export_gguf
from llmcompress.formats.gguf.families import FAMILIES, interleaved
from llmcompress.pipeline.run import run
from llmcompress.resources import bundled_checkpoint

gguf = pytest.importorskip("gguf")
SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip


def bundled() -> Path:
    folder = bundled_checkpoint("bundled/tiny")
    assert folder is not None
    return folder


def quantized(out: Path, **settings: Any) -> Path:
    stage = {"method": "rtn", "group_size": 32} | settings
    run(Recipe.of({"model": "bundled/tiny", "output": str(out), "stages": [{"quantize": stage}]}), Silent())
    return out


def values(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    from gguf.quants import dequantize

    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("format", ["gptq", "compressed_tensors"])
def test_codes_of_either_layout_are_the_same_blocks(format: str, tmp_path: Path) -> None:
    found = export_gguf(quantized(tmp_path / "w4", format=format), tmp_path / "w4.gguf", progress=Silent())
    assert found.kinds == {"Q4_0": 35, "F32": 11, "BF16": 1} and found.widened == []
    assert found.num_bytes == (tmp_path / "w4.gguf").stat().st_size
    loaded = Checkpoint.open(bundled())
    down = values(tmp_path / "w4.gguf")["blk.2.ffn_down.weight"]
    source = loaded.tensor("model.layers.2.mlp.down_proj.weight").float().numpy()
    assert np.abs(down - source).max() < np.abs(source).max() / 7


def test_narrow_codes_are_carried_and_said(tmp_path: Path) -> None:
    found = export_gguf(quantized(tmp_path / "w3", scheme="W3A16"), tmp_path / "w3.gguf", progress=Silent())
    assert found.widened == ["int3 g32 sym as Q4_0"] and "4.5 bits" in str(found)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_tensor_of_every_family_has_a_place(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SHAPE)
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(tmp_path / "model")
    for path in bundled().glob("token*"):
        shutil.copy(path, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", progress=Silent())
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == FAMILIES[model_type].arch
    count = sum(p.numel() for name, p in model.named_parameters())
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == count


def test_rows_of_a_head_are_interleaved_and_nothing_is_lost() -> None:
    rows = torch.arange(16).reshape(16, 1)
    assert interleaved(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize(
    "settings",
    [{"scheme": "NF4", "group_size": None}, {"symmetric": False}, {"group_size": 16, "format": "compressed_tensors"}],
)
def test_what_no_block_holds_is_refused_before_anything_is_written(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = quantized(tmp_path / "out", **settings)
    with pytest.raises(LLMCompressError, match="quantize with"):
        export_gguf(folder, tmp_path / "out.gguf", progress=Silent())
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*.partial"))


def test_an_unknown_family_and_another_ending_are_refused(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "neox")
    with pytest.raises(LLMCompressError, match="unknown GGUF family 'gpt_neox'"):
        export_gguf(tmp_path / "neox", tmp_path / "neox.gguf", progress=Silent())
    with pytest.raises(LLMCompressError, match=r"ends in \.gguf"):
        export_gguf(bundled(), tmp_path / "tiny.bin", progress=Silent())


def test_a_file_that_does_not_hold_what_went_in_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_bytes = exporting.Export.stored

    def flipped(self: exporting.Export, tensor: exporting.GgufTensor) -> torch.Tensor:
        data = true_bytes(self, tensor).clone()
        if tensor.name == "blk.1.ffn_up.weight":
            data.view(torch.uint8).flatten()[7] ^= 1
        return data

    monkeypatch.setattr(exporting.Export, "stored", flipped)
    with pytest.raises(LLMCompressError, match=r"blk\.1\.ffn_up\.weight does not hold"):
        export_gguf(quantized(tmp_path / "w4"), tmp_path / "w4.gguf", progress=Silent())
    assert not (tmp_path / "w4.gguf").exists() and not list(tmp_path.glob(".*.partial"))
