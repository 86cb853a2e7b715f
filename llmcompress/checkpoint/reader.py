"""A checkpoint on disk as an immutable handle: its config, its tensors on demand, and who it is.

Checkpoint.open("folder" | "org/name" | "bundled/tiny")
    config.json  ──>  .config
    model.safetensors | index + shards | (asked for) pickle  ──>  .stored[name], .tensor(name)

Everything in the folder is somebody else's: headers, index and config are checked before anything is built from them
(safetensors.py, config.py), and no name or link leads out of the folder (files.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.checkpoint.config import config_problems, size_problems
from llmcompress.checkpoint.files import inside, read_json, readable, refuse_outside
from llmcompress.checkpoint.hub import fetch
from llmcompress.checkpoint.safetensors import StoredTensor, read_header, torch_dtype
from llmcompress.errors import LLMCompressError, raise_all, shown
from llmcompress.resources import BUNDLED, bundled_checkpoint

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """An immutable handle on a folder or a Hub revision; see `open`."""

    name: str
    folder: Path
    hub_id: str | None
    revision: str | None
    config: dict[str, Any]
    stored: Mapping[str, StoredTensor]
    trust_remote_code: bool = False
    notes: tuple[str, ...] = ()
    """What a reader of the report must know, e.g. of files that lie there and are not read."""

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> Checkpoint:
        """Open a folder, a Hub id or `bundled/NAME`; reads config and headers, no weights.

        Raises: LLMCompressError for a missing or broken file, a pickle-only checkpoint or one that needs remote code
        (unless allowed), each named.
        """
        with readable(str(name)):
            folder, hub_id, commit = _locate(str(name), revision, allow_pickle)
            links = [path for path in folder.iterdir() if path.is_symlink() and not path.name.startswith(".")]
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise LLMCompressError(
                f"{name}: is an adapter, not a model of its own", f"llmcompress merge BASE {name} -o OUT"
            )
        refuse_outside(folder, links)
        config = read_json(folder / "config.json", "a checkpoint folder needs one")
        raise_all(config_problems(config, str(folder / "config.json")))
        if "auto_map" in config and not trust_remote_code and not _known_model_type(config.get("model_type")):
            raise LLMCompressError(
                f"{name}: needs code from its repository (auto_map in config.json), which would be run here",
                "read that code, then pass --trust-remote-code",
            )
        stored, notes = _stored_tensors(folder, allow_pickle)
        raise_all(size_problems(config, stored, str(folder / "config.json")))
        return cls(str(name), folder, hub_id, commit, config, stored, trust_remote_code, tuple(notes))

    def names(self) -> list[str]:
        """Tensor names, in the order of the files."""
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.stored[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor in safetensors' spelling, from the header."""
        return self.stored[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now, in its own dtype."""
        return self.stored[name].load()

    @cached_property
    def _values(self) -> tuple[str, dict[str, int]]:
        return _values_in_one_pass(self.config, self.stored)

    def identity(self) -> str:
        """sha256 over the config and every tensor's name, dtype, shape and bytes: the same model, however sharded.

        Reads the whole checkpoint, the first time.
        """
        return self._values[0]

    def require_finite(self) -> None:
        """Raise LLMCompressError naming every tensor that holds NaN or Inf. Shares its reading with `identity`."""
        raise_all(
            [
                LLMCompressError(
                    f"{self.stored[name].path}: tensor {name} holds {count} NaN or Inf values",
                    "the checkpoint is damaged: fetch or train it again",
                )
                for name, count in self._values[1].items()
            ]
        )


def _locate(name: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str | None, str | None]:
    if name.startswith(BUNDLED):
        bundled = bundled_checkpoint(name)
        if bundled is None:
            raise LLMCompressError(f"{name}: no such checkpoint is bundled", "bundled/tiny is")
        return bundled, None, None
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:
        raise LLMCompressError(f"{name}: no such user", "give the folder's full path") from error
    if folder.is_dir():
        return folder, None, None
    if folder.exists():
        raise LLMCompressError(f"{name}: is a file; a checkpoint is a folder or a Hub id")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise LLMCompressError(f"{name}: no such folder, and not a Hub id (org/name)")
    folder, commit = fetch(name, revision, allow_pickle)
    return folder, name, commit


def _known_model_type(model_type: object) -> bool:
    from transformers.models.auto import configuration_auto

    return model_type in configuration_auto.CONFIG_MAPPING


def _stored_tensors(folder: Path, allow_pickle: bool) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of the file that transformers would read, and a note on an index that lies beside it unread."""
    present = [name for name in (SINGLE, INDEX, *PICKLES) if (folder / name).is_file()]
    if not present:
        raise LLMCompressError(f"{folder}: has config.json but no weights ({SINGLE} or {INDEX})")
    read, *ignored = present
    notes = [
        f"{folder / name}: not read, since {read} is there, as in transformers" for name in ignored if name == INDEX
    ]
    if read == SINGLE:
        return read_header(inside(folder, SINGLE, folder)), notes
    if read == INDEX:
        return _indexed(folder), notes
    if not allow_pickle:
        raise LLMCompressError(
            f"{folder}: has only pickle weights, and a pickle can run code when it is read",
            "convert it to safetensors, or pass --allow-pickle if you trust where it came from",
        )
    from llmcompress.checkpoint.pickle import converted

    files = [inside(folder, read, folder)] if read == PICKLES[0] else list(shards(folder, read)[1].values())
    return read_header(converted(files)), notes


def shards(folder: Path, index: str) -> tuple[dict[str, str], dict[str, Path]]:
    """The weight map of an index (tensor -> shard) and the path of every shard, each a file inside the folder.

    Raises: LLMCompressError for an index of another shape, and for every shard that is not there or lies elsewhere.
    """
    path = inside(folder, index, folder)
    weight_map = read_json(path, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LLMCompressError(f"{path}: has no weight_map", "it maps every tensor to the file that holds it")
    wrong = next((name for name, shard in weight_map.items() if not isinstance(shard, str)), None)
    if wrong is not None:
        raise LLMCompressError(f"{path}: weight_map: {shown(wrong)} is not mapped to a file name")
    paths = {shard: inside(folder, shard, path) for shard in sorted(set(weight_map.values()))}
    raise_all(
        [
            LLMCompressError(f"{path}: names {name}, which is not there")
            for name, file in paths.items()
            if not file.is_file()
        ]
    )
    return weight_map, paths


def _indexed(folder: Path) -> dict[str, StoredTensor]:
    weight_map, paths = shards(folder, INDEX)
    tensors = {shard: read_header(path) for shard, path in paths.items()}
    lost = [f"{shown(name)} ({shard})" for name, shard in weight_map.items() if name not in tensors[shard]]
    if lost:
        raise LLMCompressError(f"{folder / INDEX}: names tensors that their shards lack: {', '.join(lost[:3])}")
    return {name: tensors[shard][name] for name, shard in weight_map.items()}


def _values_in_one_pass(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> tuple[str, dict[str, int]]:
    """`identity`, and tensor name -> how many NaN or Inf it holds. Every byte is read once, 16 MiB at a time."""
    import torch

    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    not_finite: dict[str, int] = {}
    for name in sorted(stored):
        tensor = stored[name]
        sha.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        for chunk in tensor.chunks():
            sha.update(chunk)
            values = torch.frombuffer(bytearray(chunk), dtype=torch_dtype(tensor.dtype))
            if values.is_floating_point() and values.element_size() > 1:
                bad = int(values.numel() - torch.isfinite(values).sum())
                if bad:
                    not_finite[name] = not_finite.get(name, 0) + bad
    return sha.hexdigest(), not_finite
