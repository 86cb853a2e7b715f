"""Checkpoints written whole or not at all, without holding a shard in memory.

Tensors arrive as byte streams (copied from the source, or from the file of a finished layer) and flow into shards of
bounded size; each file's sha256 is taken on the way. The caller fills a temporary folder and renames it at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

from llmcompress.checkpoint.tensors import DTYPE_BYTES
from llmcompress.report import PLAIN, Output

SHARD_BYTES = 5_000_000_000


class Streamed(Protocol):
    """A tensor that can be written without being held: copied from a file, or computed when its turn comes."""

    @property
    def name(self) -> str:
        """In the file."""
        ...

    @property
    def dtype(self) -> str:
        """In safetensors' spelling."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all chunks together."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time."""
        ...


def write_shards(folder: Path, tensors: Sequence[Streamed], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write `tensors` into `folder` as model.safetensors, or as shards with an index, in the order given.

    Returns: file name -> sha256 for every file written, index included.
    """
    groups = _grouped(tensors, shard_bytes)
    if len(groups) == 1:
        return {"model.safetensors": write_safetensors(folder / "model.safetensors", groups[0])}
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        digests[file] = write_safetensors(folder / file, group)
        weight_map.update({tensor.name: file for tensor in group})
    total = sum(tensor.num_bytes for tensor in tensors)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    digests["model.safetensors.index.json"] = hashlib.sha256(index.encode()).hexdigest()
    return digests


def write_safetensors(path: Path, tensors: Sequence[Streamed]) -> str:
    """Write one safetensors file by copying byte streams; returns its sha256. Synced to disk before returning.

    Widest dtypes first, then by name, so that every tensor starts aligned and the same tensors give the same bytes.
    """
    tensors = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _pieces(text, tensors):
            sha.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return sha.hexdigest()


def plain_output(folder: Path, digests: dict[str, str], tensors: Sequence[Streamed]) -> Output:
    """What the report says of a checkpoint of plain weights, none of them quantized, written into `folder`."""
    weights = sum(prod(tensor.shape) for tensor in tensors)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    return Output(
        format=PLAIN,
        files={name: (folder / name).stat().st_size for name in digests},
        digests=digests,
        weights_bytes=num_bytes,
        bits_per_weight=8 * num_bytes / weights,
        bits_per_weight_model=8 * num_bytes / weights,
        quantized_parameters=0,
        total_parameters=weights,
    )


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """File name -> sha256 of files that another library wrote."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def give_name(scratch: Path, out: Path) -> None:
    """Rename a finished folder to its name; an earlier result of ours steps aside first and is removed last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        os.replace(scratch, out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(out, old)
    os.replace(scratch, out)
    shutil.rmtree(old, ignore_errors=True)


def _pieces(header: bytes, tensors: Iterable[Streamed]) -> Iterable[bytes]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        yield from tensor.chunks()


def _grouped(tensors: Sequence[Streamed], shard_bytes: int) -> list[list[Streamed]]:
    groups: list[list[Streamed]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.num_bytes
    return groups
