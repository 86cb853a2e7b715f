"""The baseline's results, kept on disk: comparing ten recipes with one model runs that model once.

An entry is found by a sha256 over everything that decides its content (the checkpoint's identity, the task, its data,
few-shot count, limit, seed, versions, device, dtype), so it never goes stale; it only stops being asked for. A file is
written beside its place and renamed into it. Its first line is the sha256 of the rest: a truncated or altered file is
ignored with a message and written anew, and a cache that cannot be written costs time, not the run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.evaluate.harness import TaskRun
from llmcompress.files import write_atomic

VARIABLE = "LLMCOMPRESS_CACHE"


def cache_folder() -> Path:
    """$LLMCOMPRESS_CACHE, or ~/.cache/llmcompress; entries of this module lie in `evaluate/` below it."""
    chosen = os.environ.get(VARIABLE)
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "llmcompress") / "evaluate"


def cache_key(parts: Mapping[str, Any]) -> str:
    """sha256 over named parts, whatever their order.

    >>> cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1}) != cache_key({"a": 1, "b": 3})
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class BaselineCache:
    """Task runs by key in `folder`; `message` hears of entries that could not be read or written."""

    folder: Path
    message: Callable[[str], None]

    def get(self, key: str) -> TaskRun | None:
        """The run stored under `key`, or None when there is none or it is damaged."""
        path = self._path(key)
        try:
            checksum, _, body = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            self.message(f"{path}: cached baseline cannot be read ({error.strerror}); computed anew")
            return None
        if checksum.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
            self.message(f"{path}: cached baseline is damaged; computed anew")
            return None
        try:
            return TaskRun.model_validate_json(body)
        except ValueError:
            self.message(f"{path}: cached baseline is of another version; computed anew")
            return None

    def put(self, key: str, run: TaskRun) -> None:
        """Store `run` under `key`, whole or not at all."""
        body = run.model_dump_json().encode()
        checksum = hashlib.sha256(body).hexdigest().encode()
        try:
            write_atomic(self._path(key), checksum + b"\n" + body)
        except OSError as error:
            self.message(f"{self.folder}: the baseline's results are not cached ({error.strerror})")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
