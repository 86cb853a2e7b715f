"""Pickle checkpoints, on request only: turned into a safetensors file once, in a folder that only this user can write.

The file is found again by the sources' names, sizes and times, so its name can be guessed. In a folder that others can
write (/tmp) somebody could put weights of their own there first; hence ~/.cache/llmcompress/pickle with mode 0700, its
owner checked, and files made anew (O_EXCL) and renamed.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmcompress.errors import LLMCompressError, shown, third_party

VARIABLE = "LLMCOMPRESS_CACHE"


def converted(files: Sequence[Path]) -> Path:
    """A safetensors file with the tensors of `files`, pytorch_model*.bin, kept in the user's cache.

    Tensors are read with torch's restricted unpickler (weights only); one that shares memory with another is stored
    once, under the first name.

    Raises: LLMCompressError for a file that holds anything but tensors, and a cache that is not this user's alone.
    """
    import torch

    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    folder = _private_folder()
    target = folder / f"{hashlib.sha256(str(facts).encode()).hexdigest()[:32]}.safetensors"
    if target.is_file():
        _require_own(target)
        return target
    tensors: dict[str, torch.Tensor] = {}
    seen: set[object] = set()
    for file in files:
        with third_party(f"{file}: cannot be read as plain tensors"):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise LLMCompressError(f"{file}: holds a {type(state).__name__}, not tensors by name")
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                raise LLMCompressError(f"{file}: {shown(name)} is a {type(tensor).__name__}, not a dense tensor")
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if not tensor.numel() or memory not in seen:
                seen.add(memory)
                tensors[name] = tensor.contiguous()
    from safetensors.torch import save_file

    descriptor, scratch = tempfile.mkstemp(dir=folder)  # O_EXCL, mode 0600
    os.close(descriptor)
    try:
        with third_party(f"{files[0]}: cannot be kept as safetensors"):
            save_file(tensors, scratch)
        os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return target


def _private_folder() -> Path:
    """The cache's folder for converted files, made with mode 0700."""
    chosen = os.environ.get(VARIABLE)
    folder = (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "llmcompress") / "pickle"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise LLMCompressError(f"{folder}: cannot be made ({error.strerror})", f"set {VARIABLE} to a folder") from error
    _require_own(folder)
    return folder


def _require_own(path: Path) -> None:
    """Let pass a plain file or folder that belongs to this user and that nobody else can write."""
    facts = path.lstat()
    plain = stat.S_ISDIR(facts.st_mode) or stat.S_ISREG(facts.st_mode)
    if not plain or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise LLMCompressError(
            f"{path}: must belong to this user, and nobody else may write to it",
            f"remove it, or set {VARIABLE} to another folder",
        )
