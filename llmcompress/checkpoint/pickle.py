"""Pickle checkpoints, on request only: turned into a safetensors file once, outside the source folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from llmcompress.errors import LLMCompressError


def converted(folder: Path) -> Path:
    """A safetensors file with the tensors of `folder`'s pytorch_model*.bin, kept in the temporary folder.

    Tensors are read with torch's restricted unpickler (weights only); one that shares memory with another is stored
    once, under the first name.

    Raises: LLMCompressError for a file that holds anything but tensors.
    """
    import torch

    files = _files(folder)
    key = hashlib.sha256(str([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()
    target = Path(tempfile.gettempdir()) / f"llmcompress-{os.getuid()}-{key[:16]}.safetensors"
    if target.is_file():
        return target
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler raises many kinds; each means the same to a user
            raise LLMCompressError(f"{file}: cannot be read as plain tensors ({type(error).__name__})") from error
        for name, tensor in state.items():
            place = (tensor.data_ptr(), tuple(tensor.shape))
            if place not in seen:
                seen.add(place)
                tensors[name] = tensor.contiguous()
    from safetensors.torch import save_file

    scratch = target.with_suffix(f".{os.getpid()}")
    save_file(tensors, scratch)
    os.replace(scratch, target)
    return target


def _files(folder: Path) -> list[Path]:
    index = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        return [folder / "pytorch_model.bin"]
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise LLMCompressError(f"{index}: names {missing[0]}, which is not there")
    return [folder / shard for shard in shards]
