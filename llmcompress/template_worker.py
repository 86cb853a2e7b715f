"""The process in which `templates.py` renders: Jinja's sandbox, inside bounds on memory, files and output.

It imports nothing of this package, so that it starts at once. On stdin: a length of 8 bytes, then a pickle of
(kind, template, values, seconds) made by the parent. On stdout: a byte (`+` the text, `-` what the template raised, `!`
beyond the bounds), a length, then UTF-8. A request that its parent no longer waits for ends the process.

The environment of a chat template is that of transformers (utils/chat_template_utils.py), whose tests a template of the
Hub has passed: blocks trimmed, loop controls, `generation` blocks, tojson as it is in JSON.
"""

from __future__ import annotations

import json
import pickle
import re
import resource
import signal
import sys
from datetime import datetime
from typing import IO, Any, NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MEMORY_BYTES = 2 << 30
MAX_CHARACTERS = 1 << 20
"""Of a text, besides sixteen for every byte that went in."""


class TooLongError(Exception):
    """More text than is allowed."""


def regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    """The filter that lm-eval's own templates have."""
    return re.sub(pattern, replacement, text, count=count)


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote; the text is that of its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> Any:
        return caller()


class PlainNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: Any) -> NoReturn:
    """What a template calls to refuse a conversation."""
    raise TemplateError(message)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environments() -> dict[str, ImmutableSandboxedEnvironment]:
    """Kind of template -> where it is rendered: a task of lm-eval, a chat."""
    task = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    task.filters["regex_replace"] = regex_replace
    chat = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    chat.filters["tojson"] = tojson
    chat.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **values: dict(*args, **values),
        "namespace": PlainNamespace,
    }
    return {"task": task, "chat": chat}


class Sandbox:
    """Templates compiled once each."""

    def __init__(self) -> None:
        self._environments = environments()
        self._compiled: dict[tuple[str, str], Template] = {}

    def render(self, kind: str, template: str, values: dict[str, Any], most: int) -> str:
        """The text of a template, of at most so many characters.

        Raises: whatever the template causes; TooLongError.
        """
        key = kind, template
        if key not in self._compiled:
            self._compiled[key] = self._environments[kind].from_string(template)
        pieces, length = [], 0
        for piece in self._compiled[key].generate(**values):
            length += len(piece)
            if length > most:
                raise TooLongError(f"more than {most} characters")
            pieces.append(piece)
        return "".join(pieces)


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer every request until there are no more."""
    sandbox = Sandbox()
    reply(replies, b"+", "ready")
    while head := requests.read(8):
        size = int.from_bytes(head, "big")
        kind, template, values, seconds = pickle.loads(requests.read(size))  # the parent made it
        signal.alarm(2 * int(seconds) + 2)
        try:
            text, outcome = sandbox.render(kind, template, values, MAX_CHARACTERS + 16 * size), b"+"
        except (TooLongError, MemoryError) as error:
            text, outcome = str(error) or "out of memory", b"!"
        except Exception as error:  # noqa: BLE001 - a template can cause any
            text, outcome = f"{type(error).__name__}: {error}"[:400], b"-"
        signal.alarm(0)
        reply(replies, outcome, text)


def reply(replies: IO[bytes], outcome: bytes, text: str) -> None:
    """Send one answer."""
    data = text.encode(errors="backslashreplace")
    replies.write(outcome + len(data).to_bytes(8, "big") + data)
    replies.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)
