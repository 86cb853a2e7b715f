"""The baseline's side of a comparison: its results from the cache, and its model only once somebody needs it.

Comparing ten recipes with one model runs that model once. An entry is found by a sha256 over everything that decides
its content (the checkpoint's identity, the task, its data, few-shot count, limit, seed, versions, device, dtype), so it
never goes stale; it only stops being asked for. A file is written beside its place and renamed into it. Its first line
is the sha256 of the rest: a truncated or altered file is ignored with a message and written anew, and a cache that
cannot be written costs time, not the run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import Progress
from llmcompress.evaluate import engines
from llmcompress.evaluate.harness import ReadyTask, TaskRun, run_task
from llmcompress.evaluate.results import mismatch
from llmcompress.evaluate.settings import EvaluateChoice
from llmcompress.files import write_atomic
from llmcompress.models.loading import best_device, compute_dtype

if TYPE_CHECKING:
    import torch

VARIABLE = "LLMCOMPRESS_CACHE"
LIBRARIES = ("lm_eval", "torch", "transformers", "datasets", "tokenizers")
"""Whose versions are part of a cached result's key."""
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(slots=True)
class Baseline:
    """One baseline checkpoint during one evaluation; `num_computed` counts the runs that the cache did not have.

    dtype: what it is computed in, that of the checkpoint it is compared with; None: see `loading.compute_dtype`.
    streams: a layer at a time in any case, not only where it does not fit.
    """

    checkpoint: Checkpoint
    cache: BaselineCache
    progress: Progress
    batch_size: int
    seed: int
    dtype: torch.dtype | None = None
    streams: bool = False
    loaded: engines.Loaded | None = None
    num_computed: int = 0

    def model(self) -> engines.Loaded:
        """The loaded model; the first call loads it.

        Raises: LLMCompressError when it does not load.
        """
        if self.loaded is None:
            self.progress.message(f"loading baseline {self.checkpoint.name}")
            trust = self.checkpoint.trust_remote_code
            choice: EvaluateChoice = "stream" if self.streams else "auto"
            loaded = engines.load(self.checkpoint.folder, choice, trust, self.dtype, streams=True)
            self.loaded = loaded.guarded()
        return self.loaded

    def run(self, task: ReadyTask, limit: int | None, after: TaskRun) -> TaskRun:
        """The baseline's run of a task: from the cache where its items are those that `after` saw, else computed."""
        key = self._key(task, limit)
        cached = self.cache.get(key)
        if cached is not None and mismatch(cached, after) is None:
            return cached
        if cached is not None:
            self.progress.message(f"task {task.name}: the cached baseline saw other items; computed anew")
        loaded = self.model()
        run = run_task(task, loaded.model, loaded.tokenizer, limit, self.batch_size, self.seed)
        self.num_computed += 1
        self.cache.put(key, run)
        return run

    def _key(self, task: ReadyTask, limit: int | None) -> str:
        return cache_key(
            {
                "checkpoint": self.checkpoint.identity(),
                "tokenizer": tokenizer_digest(self.checkpoint.folder),
                "task": [task.name, task.num_fewshot, limit, task.digest],
                "batch_size": self.batch_size,
                "seed": self.seed,
                "versions": {name: version(name) for name in LIBRARIES},
                "device": str(best_device()),
                "dtype": str(self.dtype or compute_dtype(self.checkpoint.config)),
            }
        )


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the tokenizer's files: what turns the same text into the same ids."""
    sha = hashlib.sha256()
    for path in sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}):
        sha.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def cache_folder() -> Path:
    """$LLMCOMPRESS_CACHE, or ~/.cache/llmcompress; task runs lie in `evaluate/` below it."""
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
