"""The baseline's side of a comparison: its results from the cache, and its model only once somebody needs it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import Progress
from llmcompress.evaluate import engines as engine
from llmcompress.evaluate.cache import BaselineCache, cache_key
from llmcompress.evaluate.harness import ReadyTask, TaskRun, run_task
from llmcompress.evaluate.results import mismatch
from llmcompress.models.device import best

LIBRARIES = ("lm_eval", "torch", "transformers", "datasets", "tokenizers")
"""Whose versions are part of a cached result's key."""


@dataclass(slots=True)
class Baseline:
    """One baseline checkpoint during one evaluation; `num_computed` counts the runs that the cache did not have."""

    checkpoint: Checkpoint
    cache: BaselineCache
    progress: Progress
    batch_size: int
    seed: int
    loaded: engine.Loaded | None = None
    num_computed: int = 0

    def model(self) -> engine.Loaded:
        """The loaded model; the first call loads it.

        Raises: LLMCompressError when it does not load.
        """
        if self.loaded is None:
            self.progress.message(f"loading baseline {self.checkpoint.name}")
            self.loaded = engine.load(self.checkpoint.folder, "auto", self.checkpoint.trust_remote_code)
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
                "tokenizer": engine.tokenizer_digest(self.checkpoint.folder),
                "task": [task.name, task.num_fewshot, limit, task.digest],
                "batch_size": self.batch_size,
                "seed": self.seed,
                "versions": {name: version(name) for name in LIBRARIES},
                "device": str(best()),
                "dtype": str(engine.compute_dtype(self.checkpoint.folder)),
            }
        )
