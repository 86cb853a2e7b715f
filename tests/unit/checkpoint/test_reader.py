"""Opening checkpoints: what is read, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from tests import tiny_models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_models.save(tmp_path / "sharded", tiny_models.configs()["llama"], max_shard_size="100KB")


def refused(path: Path | str, **options: bool) -> str:
    with pytest.raises(LLMCompressError) as caught:
        Checkpoint.open(path, **options)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message
    return caught.value.message


def test_tensors_are_those_of_the_safetensors_library(folder: Path) -> None:
    checkpoint, expected = Checkpoint.open(folder), load_file(folder / "model.safetensors")
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_sharding_does_not_change_who_a_checkpoint_is(folder: Path, sharded: Path) -> None:
    one, many = Checkpoint.open(folder), Checkpoint.open(sharded)
    assert len({tensor.path for tensor in many.stored.values()}) > 2
    assert one.identity() == many.identity()
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, folder / "model.safetensors")
    assert Checkpoint.open(folder).identity() != many.identity()


def test_no_folder_no_config_no_weights(tmp_path: Path, folder: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nothing")
    assert "is a file" in refused(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "no weights" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "holds a list" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json: not found" in refused(folder)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert "model.safetensors: truncated" in refused(folder)
    path.write_bytes(data[:4])
    assert "truncated or not a safetensors file" in refused(folder)
    path.write_bytes(data + b"x")
    assert "longer than its header says" in refused(folder)


def test_a_dtype_that_does_not_fit_the_bytes_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert data.count(b'"F32"') > 3
    path.write_bytes(data.replace(b'"F32"', b'"F64"', 1))
    assert "has" in refused(folder) and "F64" in refused(folder)
    path.write_bytes(data.replace(b'"F32"', b'"Q99"', 1))
    assert "dtype Q99" in refused(folder)


def test_an_index_that_names_what_is_not_there(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["model.norm.weight"]
    content["weight_map"]["model.extra"] = shard
    index.write_text(json.dumps(content))
    assert "model.extra" in refused(sharded)
    (sharded / shard).unlink()
    assert f"names {shard}, which is not there" in refused(sharded)


def test_nan_and_inf_are_named_and_counted(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, :3] = float("nan")
    state["model.norm.weight"][1] = float("inf")
    save_file(state, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(LLMCompressError) as caught:
        checkpoint.require_finite()
    said = "\n".join(caught.value.lines())
    assert "model.layers.1.mlp.up_proj.weight holds 3 NaN or Inf" in said
    assert "model.norm.weight holds 1 NaN or Inf" in said


def test_pickles_are_refused_unless_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    expected = Checkpoint.open(folder).identity()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert "only pickle weights" in refused(folder)
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    assert Checkpoint.open(folder, allow_pickle=True).identity() == expected
    torch.save({"x": print}, folder / "pytorch_model.bin")
    assert "cannot be read as plain tensors" in refused(folder, allow_pickle=True)


def test_remote_code_is_refused_unless_trusted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "novelty", "auto_map": {"AutoModelForCausalLM": "modeling_novelty.Novelty"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "needs code from its repository" in refused(folder)
    assert Checkpoint.open(folder, trust_remote_code=True).trust_remote_code
    config["model_type"] = "llama"
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(folder).config["model_type"] == "llama", "transformers knows this type itself"


def test_a_hub_id_that_cannot_be_fetched_is_one_clear_error() -> None:
    assert "cannot be fetched from the Hub" in refused("nobody/nothing-of-the-kind")
    assert "not a Hub id" in refused("just-a-word")
    assert "no such checkpoint is bundled" in refused("bundled/none")
