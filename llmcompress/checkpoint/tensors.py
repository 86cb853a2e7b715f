"""Safetensors files read without mapping them: a header, and bytes fetched where they are needed.

The layout is eight bytes of header length (little endian), a JSON header of dtype, shape and byte range per tensor,
then the bytes. Reading with pread keeps resident memory at what is in use, where a mapping would count every page
touched; copying a tensor to another file never builds it.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import LLMCompressError

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: a file, a byte range, and how to read it. dtype is safetensors' spelling, e.g. BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, at most 16 MiB at a time.

        Raises: LLMCompressError when the file ends early.
        """
        with self.path.open("rb", buffering=0) as file:
            position, end = self.start, self.start + self.num_bytes
            while position < end:
                data = os.pread(file.fileno(), min(CHUNK_BYTES, end - position), position)
                if not data:
                    raise self._ends_early()
                yield data
                position += len(data)

    def load(self) -> torch.Tensor:
        """The tensor, in its own dtype, in memory of its own: pages of the system's, and no part of the heap.

        Tensors are read in one thread and freed in another, which a heap takes badly: its free pages pile up.
        Raises: LLMCompressError when the file ends early.
        """
        import torch

        dtype = torch_dtype(self.dtype)
        if not self.num_bytes:
            return torch.empty(self.shape, dtype=dtype)
        buffer = mmap.mmap(-1, self.num_bytes)
        view, done = memoryview(buffer), 0
        with self.path.open("rb", buffering=0) as file:
            while done < self.num_bytes:
                got = os.preadv(file.fileno(), [view[done : done + CHUNK_BYTES]], self.start + done)
                if not got:
                    raise self._ends_early()
                done += got
        return torch.frombuffer(buffer, dtype=dtype).reshape(self.shape)

    def _ends_early(self) -> LLMCompressError:
        return LLMCompressError(f"{self.path}: ends inside tensor {self.name}", "fetch the file again")


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """The tensors of some safetensors files of one folder, read on demand: weights without a model around them."""

    folder: Path
    stored: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, paths: Sequence[Path]) -> TensorFiles:
        """Read the headers of one file or more. Raises: LLMCompressError naming a file that is broken."""
        return cls(paths[0].parent, {name: tensor for path in paths for name, tensor in read_header(path).items()})

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now, in its own dtype."""
        return self.stored[name].load()


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for safetensors' spelling, e.g. BF16."""
    import torch

    names = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    }  # fmt: skip
    return names[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' spelling of a torch dtype."""
    return next(name for name in DTYPE_BYTES if torch_dtype(name) == dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against the file's length.

    Raises: LLMCompressError naming the file when it is truncated, or a tensor's bytes do not fit dtype and shape.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise LLMCompressError(f"{path}: truncated or not a safetensors file ({size} bytes)", "fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise LLMCompressError(f"{path}: its safetensors header is not JSON", "fetch it again") from error
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        what = "truncated" if end > size else "longer than its header says"
        raise LLMCompressError(f"{path}: {what} ({size} bytes, the header wants {end})", "fetch it again")
    return tensors


def _stored(path: Path, name: str, entry: dict[str, Any], base: int) -> StoredTensor:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    start, end = entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise LLMCompressError(f"{path}: tensor {name} has dtype {dtype}, which is not supported")
    if prod(shape) * DTYPE_BYTES[dtype] != end - start:
        raise LLMCompressError(f"{path}: tensor {name} has {end - start} bytes, not those of {dtype} {list(shape)}")
    return StoredTensor(name, dtype, shape, path, base + start, end - start)
