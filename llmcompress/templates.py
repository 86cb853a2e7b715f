"""Jinja templates that somebody else wrote, rendered by a process of their own with bounds on time, memory and text.

A template is a program. Jinja's sandbox keeps it from Python's objects (`{{ cycler.__init__.__globals__ }}`), but not
from running for ever: two nested loops, `"x" * 10**10`, one regular expression. No count of loop turns covers all of
these, so the bound is the operating system's: a child process that is given some seconds and some memory, and killed.

    render_chat     a conversation in the template that came with a tokenizer
    Renderer        templates of tasks, as lm-eval writes them
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from llmcompress.errors import LLMCompressError, shown

SECONDS_TO_START, SECONDS_TO_RENDER = 60.0, 5.0
SECONDS_IN_ALL, SECONDS_ON_AVERAGE = 20.0, 0.5
"""What is rendered for longer than the first must not take longer than the second each."""
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateRefusalError(LLMCompressError):
    """A template that raised something for these values; others may suit it. `reason`: what, without the template."""

    reason = ""


class Renderer:
    """Renders templates as long as the block lasts; the process starts with the first of them."""

    def __init__(self, seconds: float = SECONDS_TO_RENDER, kind: Literal["task", "chat"] = "task") -> None:
        self._seconds, self._kind = seconds, kind
        self._process: subprocess.Popen[bytes] | None = None
        self._spent, self._num_rendered = 0.0, 0

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """The text of `template` with `values` as its variables.

        Raises: LLMCompressError for a template that goes beyond the bounds on time, memory and text;
        TemplateRefusalError, which is one, for one that is none, raises, or reaches for what the sandbox denies.
        """
        process = self._process or self._start()
        request = pickle.dumps((self._kind, template, dict(values), self._seconds))
        began = time.monotonic()
        try:
            assert process.stdin is not None
            process.stdin.write(len(request).to_bytes(8, "big") + request)
            process.stdin.flush()
            outcome, text = self._reply(process, self._seconds)
        except TimeoutError:  # an OSError too
            self.close()
            outcome, text = b"!", f"it took more than {self._seconds:g} s"
        except (OSError, EOFError):
            self.close()
            outcome, text = b"!", "its process ended: out of memory, or nested too deeply"
        self._spent += time.monotonic() - began
        self._num_rendered += 1
        if self._spent > max(SECONDS_IN_ALL, SECONDS_ON_AVERAGE * self._num_rendered):
            outcome, text = b"!", f"{self._num_rendered} texts took {self._spent:.0f} s"
        if outcome == b"+":
            return text
        kind = TemplateRefusalError if outcome == b"-" else LLMCompressError
        error = kind(f"template {shown(template, 60)!r}: cannot be rendered ({shown(text, 160)})")
        if isinstance(error, TemplateRefusalError):
            error.reason = shown(text, 160)
        raise error

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
        """One answer: its outcome (see template_worker.py), and its text. Raises TimeoutError, EOFError."""
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


_SEEN = "{{ {%s} | tojson }}"
"""A chat template of ours: what another would see, once transformers has brought messages and tools into shape."""
_lock = threading.Lock()
_chats: dict[int, Renderer] = {}
"""The renderer of this process, by its id: a process that was forked from it gets its own."""


def render_chat(
    tokenizer: Any, messages: Any, tools: Any = None, *, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """What `tokenizer.apply_chat_template(…, tokenize=False)` gives, the template being rendered within bounds.

    variables: further ones of the template. A tokenizer that lays chats out without a template (mistral-common's) does
    so itself.

    Raises: TemplateRefusalError where the template refuses the conversation, LLMCompressError where it goes beyond the
    bounds; ValueError, TypeError and the like for messages that transformers refuses.
    """
    from transformers import PreTrainedTokenizerBase

    how: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt, "tokenize": False}
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return str(tokenizer.apply_chat_template(messages, **how, **variables))
    template = tokenizer.get_chat_template(None, tools)
    names = ["messages", "tools", "documents", "add_generation_prompt", *tokenizer.special_tokens_map, *variables]
    seen = _SEEN % ", ".join(f"{name!r}: {name}" for name in names)
    values = json.loads(tokenizer.apply_chat_template(messages, chat_template=seen, **how, **variables))
    with _lock:
        renderer = _chats.setdefault(os.getpid(), Renderer(kind="chat"))
        return renderer.render(template, values)
