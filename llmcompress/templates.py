"""Jinja templates that somebody else wrote, rendered by a process of their own with bounds on time, memory and text.

A template is a program. Jinja's sandbox keeps it from Python's objects (`{{ cycler.__init__.__globals__ }}`), but not
from running for ever: two nested loops, `"x" * 10**10`, one regular expression. No count of loop turns covers all of
these, so the bound is the operating system's: a child process that is given some seconds and some memory, and killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmcompress.errors import LLMCompressError, shown

SECONDS_TO_START, SECONDS_TO_RENDER = 60.0, 5.0
WORKER = Path(__file__).with_name("template_worker.py")


class Renderer:
    """Renders templates as long as the block lasts; the process starts with the first of them."""

    def __init__(self, seconds: float = SECONDS_TO_RENDER) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """The text of `template` with `values` as its variables.

        Raises: LLMCompressError for a template that is none, reaches for what the sandbox denies, or goes beyond the
        bounds on time, memory and text.
        """
        process = self._process or self._start()
        request = pickle.dumps((template, dict(values)))
        try:
            assert process.stdin is not None
            process.stdin.write(len(request).to_bytes(8, "big") + request)
            process.stdin.flush()
            kind, text = self._reply(process, self._seconds)
        except TimeoutError:  # an OSError too
            self.close()
            kind, text = b"-", f"it took more than {self._seconds:g} s"
        except (OSError, EOFError):
            self.close()
            kind, text = b"-", "its process ended: out of memory, or nested too deeply"
        if kind == b"+":
            return text
        raise LLMCompressError(f"template {shown(template, 60)!r}: cannot be rendered ({shown(text, 160)})")

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of the worker is this package, whose modules must not stand in for others of the same name
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._reply(self._process, SECONDS_TO_START)
        except (OSError, EOFError) as error:
            self.close()
            raise LLMCompressError(
                "the process that renders templates does not start", "is jinja2 installed?"
            ) from error
        return self._process

    def _reply(self, process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, str]:
        """One answer: + or -, and its text. Raises TimeoutError, EOFError."""
        deadline = time.monotonic() + seconds
        assert process.stdout is not None
        replies = process.stdout.fileno()

        def read(size: int) -> bytes:
            data = b""
            while len(data) < size:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([replies], [], [], left)[0]:
                    raise TimeoutError
                piece = os.read(replies, size - len(data))
                if not piece:
                    raise EOFError
                data += piece
            return data

        head = read(9)
        return head[:1], read(int.from_bytes(head[1:], "big")).decode()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
