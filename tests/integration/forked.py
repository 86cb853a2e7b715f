"""Commands run in processes that share their imports: a server forks one for each, so that a run is what takes time.

Importing torch and transformers takes seconds, most commands on a tiny model less than one: a process killed at a
random moment would nearly always be killed while it imports.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

PRELOAD = "tests.integration.forked_imports"
KILLED = -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code, negative for a signal, what it said on stderr, and how long it took."""

    code: int
    said: str
    seconds: float

    def problems(self) -> list[str]:
        """The lines that are errors."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context


CONTEXT = _context()


class Command:
    """`llmcompress ARGUMENTS` in a process of its own, begun at once. limits: name of resource.RLIMIT_… -> soft limit."""

    def __init__(
        self, arguments: Sequence[object], cache: object, limits: Mapping[str, int] | None = None, cwd: object = "/"
    ) -> None:
        self._answer, theirs = CONTEXT.Pipe(duplex=False)
        asked = [str(argument) for argument in arguments], str(cache), dict(limits or {}), str(cwd)
        self._process = CONTEXT.Process(target=_command, args=(theirs, *asked))
        self._began = time.monotonic()
        self._process.start()
        theirs.close()

    def kill(self, after: float) -> Ended:
        """End it with SIGKILL when so many seconds have passed."""
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        return self.wait(60)

    def wait(self, seconds: float = 300) -> Ended:
        """Its end; one that takes longer is killed, and its code is that of the signal."""
        said = ""
        if self._answer.poll(seconds):
            with contextlib.suppress(EOFError, ConnectionResetError):
                said = self._answer.recv()
        else:
            self._process.kill()
        self._process.join()
        self._answer.close()
        return Ended(self._process.exitcode, said, time.monotonic() - self._began)


def _command(answer: Connection, arguments: list[str], cache: str, limits: dict[str, int], cwd: str) -> None:
    from llmcompress.cli.main import run

    os.environ |= {"LLMCOMPRESS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    os.chdir(cwd)
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    for name, limit in limits.items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
    try:
        code = run(arguments)
    except BaseException as error:  # noqa: BLE001 - what `run` lets through is what a user would see as a traceback
        code, sys.stderr = 99, io.StringIO(f"Traceback: {type(error).__name__}: {error}")
    text = sys.stderr.getvalue()  # type: ignore[union-attr]
    for name in limits:
        kind = getattr(resource, name)
        resource.setrlimit(kind, (resource.getrlimit(kind)[1],) * 2)
    answer.send(text)
    answer.close()
    os._exit(code)
