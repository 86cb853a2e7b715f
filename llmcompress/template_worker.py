"""The process in which `templates.py` renders: Jinja's sandbox, inside bounds on memory, files and output.

It imports nothing of this package, so that it starts at once. On stdin: a length of 8 bytes, then a pickle of
(template, values) made by the parent. On stdout: `+` or `-`, a length, then UTF-8: the text, or what was wrong.
"""

from __future__ import annotations

import pickle
import re
import resource
import sys
from typing import IO, Any

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 2 << 30
MAX_CHARACTERS = 1 << 20


def regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    """The filter that lm-eval's own templates have."""
    return re.sub(pattern, replacement, text, count=count)


class Sandbox:
    """Templates compiled once each."""

    def __init__(self) -> None:
        self._environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self._environment.filters["regex_replace"] = regex_replace
        self._compiled: dict[str, Template] = {}

    def render(self, template: str, values: dict[str, Any]) -> str:
        """The text of a template.

        Raises: whatever the template causes; ValueError for more text than is allowed.
        """
        if template not in self._compiled:
            self._compiled[template] = self._environment.from_string(template)
        pieces, length = [], 0
        for piece in self._compiled[template].generate(**values):
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise ValueError(f"more than {MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer every request until there are no more."""
    sandbox = Sandbox()
    reply(replies, b"+", "ready")
    while head := requests.read(8):
        template, values = pickle.loads(requests.read(int.from_bytes(head, "big")))  # the parent made it
        try:
            text, kind = sandbox.render(template, values), b"+"
        except Exception as error:  # noqa: BLE001 - a template can cause any
            text, kind = f"{type(error).__name__}: {error}"[:400], b"-"
        reply(replies, kind, text)


def reply(replies: IO[bytes], kind: bytes, text: str) -> None:
    """Send one answer."""
    data = text.encode(errors="backslashreplace")
    replies.write(kind + len(data).to_bytes(8, "big") + data)
    replies.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
