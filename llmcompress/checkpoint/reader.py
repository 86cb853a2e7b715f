"""A checkpoint on disk as an immutable handle: its config, its tensors on demand, and who it is.

Checkpoint.open("folder" | "org/name" | "bundled/tiny")
    config.json  ──>  .config
    model.safetensors | index + shards | (asked for) pickle  ──>  .stored[name], .tensor(name)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.checkpoint.hub import fetch
from llmcompress.checkpoint.scan import Scan, scan
from llmcompress.checkpoint.tensors import StoredTensor, read_header
from llmcompress.errors import LLMCompressError, raise_all
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
        folder, hub_id, commit = _locate(str(name), revision, allow_pickle)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise LLMCompressError(
                f"{name}: is an adapter, not a model of its own", f"llmcompress merge BASE {name} -o OUT"
            )
        config = _read_json(folder / "config.json", "a checkpoint folder needs one")
        if "auto_map" in config and not trust_remote_code and not _known_model_type(config.get("model_type")):
            raise LLMCompressError(
                f"{name}: needs code from its repository (auto_map in config.json), which would be run here",
                "read that code, then pass --trust-remote-code",
            )
        stored = _stored_tensors(folder, allow_pickle)
        return cls(str(name), folder, hub_id, commit, config, stored, trust_remote_code)

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
    def _scan(self) -> Scan:
        return scan(self.config, self.stored)

    def identity(self) -> str:
        """sha256 over the config and every tensor's name, dtype, shape and bytes: the same model, however sharded.

        Reads the whole checkpoint, the first time.
        """
        return self._scan.identity

    def require_finite(self) -> None:
        """Raise LLMCompressError naming every tensor that holds NaN or Inf. Shares its reading with `identity`."""
        raise_all(
            [
                LLMCompressError(
                    f"{self.stored[name].path}: tensor {name} holds {count} NaN or Inf values",
                    "the checkpoint is damaged: fetch or train it again",
                )
                for name, count in self._scan.not_finite.items()
            ]
        )


def _locate(name: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str | None, str | None]:
    if name.startswith(BUNDLED):
        bundled = bundled_checkpoint(name)
        if bundled is None:
            raise LLMCompressError(f"{name}: no such checkpoint is bundled", "bundled/tiny is")
        return bundled, None, None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None, None
    if folder.exists():
        raise LLMCompressError(f"{name}: is a file; a checkpoint is a folder or a Hub id")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise LLMCompressError(f"{name}: no such folder, and not a Hub id (org/name)")
    folder, commit = fetch(name, revision, allow_pickle)
    return folder, name, commit


def _read_json(path: Path, rule: str) -> dict[str, Any]:
    if not path.is_file():
        raise LLMCompressError(f"{path}: not found; {rule}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LLMCompressError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise LLMCompressError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _known_model_type(model_type: object) -> bool:
    from transformers.models.auto import configuration_auto

    return model_type in configuration_auto.CONFIG_MAPPING


def _stored_tensors(folder: Path, allow_pickle: bool) -> dict[str, StoredTensor]:
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not any((folder / name).is_file() for name in PICKLES):
        raise LLMCompressError(f"{folder}: has config.json but no weights ({SINGLE} or {INDEX})")
    if not allow_pickle:
        raise LLMCompressError(
            f"{folder}: has only pickle weights, and a pickle can run code when it is read",
            "convert it to safetensors, or pass --allow-pickle if you trust where it came from",
        )
    from llmcompress.checkpoint.pickle import converted

    return read_header(converted(folder))


def _indexed(folder: Path) -> dict[str, StoredTensor]:
    weight_map = _read_json(folder / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LLMCompressError(f"{folder / INDEX}: has no weight_map")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    raise_all([LLMCompressError(f"{folder / INDEX}: names {shard}, which is not there") for shard in missing])
    tensors = {shard: read_header(folder / shard) for shard in shards}
    lost = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in tensors[shard]]
    if lost:
        raise LLMCompressError(f"{folder / INDEX}: names tensors that their shards lack: {', '.join(lost[:3])}")
    return {name: tensors[shard][name] for name, shard in weight_map.items()}
