"""The measure stage: how fast both models run here, their rounds taken in turn.

    a process each      load ──┬── round 1: baseline prefill, decode · compressed prefill, decode
    (so that memory            ├── round 2: compressed first, then baseline
    is each one's own)         └── …                                   ──> tokens/s of every round, peak memory

Prefill reads a prompt in one forward pass; decode writes greedily, a token at a time, with the model's own cache. The
two take turns, so a machine that slows down slows both. One sequence at a time, as on a laptop; a server that batches
has other figures. The baseline is computed in the dtype that the compressed model runs in, so that neither is faster or
smaller by its dtype alone; where that is not the dtype that it is stored in, its note says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError
from llmcompress.evaluate import engines
from llmcompress.evaluate.settings import MeasureSettings
from llmcompress.report import Measurement, Speed, environment

PREFIX = "llmcompress-speed "
"""How a response starts on a worker's stdout; whatever else is there, libraries wrote."""
BASELINE, COMPRESSED = "baseline", "compressed"


def measure(checkpoint: Path, baseline: Checkpoint, settings: MeasureSettings, *, progress: Progress) -> Measurement:
    """Time both models and take their memory.

    Raises: LLMCompressError when one does not load, or they take fewer tokens than asked.
    """
    prompt_tokens = _prompt_tokens([baseline.folder, checkpoint], settings)
    trust = baseline.trust_remote_code
    with (
        progress.step("measuring speed", settings.rounds) as bar,
        _Worker(baseline.folder, "auto", trust, prompt_tokens, settings.new_tokens) as base,
        _Worker(checkpoint, settings.engine, trust, prompt_tokens, settings.new_tokens) as small,
    ):
        loaded = {COMPRESSED: small.ask("load")}
        loaded[BASELINE] = base.ask(f"load {loaded[COMPRESSED]['dtype']}")
        workers = [(BASELINE, base), (COMPRESSED, small)]
        rounds: dict[str, list[dict[str, float]]] = {BASELINE: [], COMPRESSED: []}
        for number in range(settings.rounds):
            for name, worker in workers if number % 2 == 0 else reversed(workers):
                rounds[name].append(worker.ask("round"))
            bar.advance(1)
        memory = {name: worker.ask("memory") for name, worker in workers}
    machine = environment.describe()
    return Measurement(
        baseline=baseline.identity(),
        prompt_tokens=prompt_tokens,
        new_tokens=settings.new_tokens,
        batch_size=1,
        num_threads=machine.num_threads,
        hardware=machine.accelerator or machine.processor,
        rows=[_row(name, loaded[name], rounds[name], memory[name]) for name, _ in workers],
    )


def _prompt_tokens(folders: list[Path], settings: MeasureSettings) -> int:
    longest = [limit for limit in map(engines.max_positions, folders) if limit is not None]
    room = min(longest, default=settings.prompt_tokens + settings.new_tokens) - settings.new_tokens
    if room < 1:
        raise LLMCompressError(
            f"measure: new_tokens is {settings.new_tokens}; the models take {min(longest)} positions in all",
            "choose fewer",
        )
    return min(settings.prompt_tokens, room)


def _row(name: Any, loaded: dict[str, Any], rounds: list[dict[str, float]], memory: dict[str, Any]) -> Speed:
    named = (
        "engine",
        "engine_note",
        "kernels",
        "device",
        "dtype",
        "stored_dtype",
        "load_s",
        "memory_before_load_bytes",
    )
    return Speed(
        model=name,
        prefill_tokens_per_s=[timing["prefill_tokens_per_s"] for timing in rounds],
        decode_tokens_per_s=[timing["decode_tokens_per_s"] for timing in rounds],
        peak_memory_bytes=memory["peak_memory_bytes"],
        **{key: loaded[key] for key in named},
    )


class _Worker:
    """A process with one model; it writes a line of JSON for each command that it reads."""

    def __init__(self, folder: Path, choice: str, trust: bool, prompt_tokens: int, new_tokens: int) -> None:
        self._folder = folder
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        request = {"folder": str(folder), "engine": choice, "trust_remote_code": trust}
        request |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmcompress.evaluate.speed_worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def ask(self, command: str) -> dict[str, Any]:
        """The worker's response to `load` (or `load DTYPE`), `round` or `memory`.

        Raises: LLMCompressError with the worker's own error, or when it has died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: its stdout has ended too, which is reported below
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                response: dict[str, Any] = json.loads(line.removeprefix(PREFIX))
                if "error" in response:
                    raise LLMCompressError(f"measure: {response['error']}")
                return response
        code = self._process.wait()
        raise LLMCompressError(
            f"measure: the process that runs {self._folder} ended with code {code}", "is there memory for both models?"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
