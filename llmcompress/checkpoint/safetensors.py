"""Safetensors files read without mapping them: a header, and bytes fetched where they are needed.

The layout is eight bytes of header length (little endian), a JSON header of dtype, shape and byte range per tensor,
then the bytes. Reading with pread keeps resident memory at what is in use, where a mapping would count every page
touched; copying a tensor to another file never builds it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.checkpoint.files import json_object, readable
from llmcompress.errors import LLMCompressError, shown

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
CHUNK_BYTES = 16 << 20
MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""
MAX_DIMENSIONS = 64
"""As in torch."""


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
        with readable(str(self.path)), self.path.open("rb", buffering=0) as file:
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
        with readable(str(self.path)), self.path.open("rb", buffering=0) as file:
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
        "F8_E8M0": torch.float8_e8m0fnu,
        "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    }  # fmt: skip
    return names[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' spelling of a torch dtype."""
    return next(name for name in DTYPE_BYTES if torch_dtype(name) == dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the header's order.

    The header is taken for nothing but a claim: it must fit into the file, be one JSON object without a name given
    twice, and its byte ranges must tile the data exactly, each as long as dtype and shape say.

    Raises: LLMCompressError naming the file, the tensor, the value and the rule.
    """
    with readable(str(path)), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"truncated or not a safetensors file ({size} bytes)")
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its header would be {length} bytes, where at most {MAX_HEADER_BYTES} are read")
        text = file.read(length)
    header = json_object(text, f"{path}: safetensors header", unique_keys=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ must map names to text")
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes)):
        if tensor.start != position:
            what = "inside another tensor's bytes" if tensor.start < position else "after bytes that belong to none"
            raise _damaged(path, f"tensor {shown(tensor.name)} begins {what}")
        position += tensor.num_bytes
    if position != size:
        what = "truncated" if position > size else "longer than its header says"
        raise _damaged(path, f"{what} ({size} bytes, the header wants {position})")
    return tensors


def _stored(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    tensor = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{tensor} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise LLMCompressError(f"{path}: {tensor} has dtype {shown(dtype)}, which is not supported", f"known: {known}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(
            path, f"{tensor} has shape {shown(shape)}; it must be a list of up to {MAX_DIMENSIONS} integers from 0 up"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{tensor} has data_offsets {shown(offsets)}; they must be [begin, end], begin <= end")
    begin, end = offsets
    if prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise _damaged(path, f"{tensor} has {end - begin} bytes, not those of {dtype} {shown(shape)}")
    return StoredTensor(name, dtype, tuple(shape), path, base + begin, end - begin)


def _sizes(values: Any) -> bool:
    """Whether `values` is a list of integers from 0 up; JSON's true and 2.0 are none."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _damaged(path: Path, what: str) -> LLMCompressError:
    return LLMCompressError(f"{path}: {what}", "fetch the file again")
