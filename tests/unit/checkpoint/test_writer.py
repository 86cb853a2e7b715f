"""Writing checkpoints: what other readers see."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import DTYPE_BYTES, dtype_name, torch_dtype
from llmcompress.checkpoint.writer import write_shards
from tests import tiny_models


def test_copies_are_equal_and_read_by_the_safetensors_library(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_models.save(tmp_path / "in", tiny_models.configs()["gpt2"], dtype=torch.bfloat16))
    digests = write_shards(tmp_path, list(source.stored.values()))
    assert list(digests) == ["model.safetensors"]
    assert digests["model.safetensors"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    written = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == dict.fromkeys(source.names(), torch.bfloat16)
    assert all(torch.equal(written[name], source.tensor(name)) for name in source.names())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_models.save(tmp_path / "in", tiny_models.configs()["llama"]))
    tensors = list(source.stored.values())
    digests = write_shards(tmp_path, tensors, shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(source.names())
    assert index["metadata"]["total_size"] == sum(tensor.num_bytes for tensor in tensors)
    for file in set(index["weight_map"].values()):
        assert digests[file] == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        assert sum(tensor.numel() * 4 for tensor in load_file(tmp_path / file).values()) <= 100_000
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    assert Checkpoint.open(tmp_path).identity() == source.identity()


def test_dtype_spellings_are_one_to_one() -> None:
    assert [dtype_name(torch_dtype(name)) for name in DTYPE_BYTES] == list(DTYPE_BYTES)
    assert [torch.empty(1, dtype=torch_dtype(name)).element_size() for name in DTYPE_BYTES] == list(
        DTYPE_BYTES.values()
    )
