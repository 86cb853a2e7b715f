"""Markdown that stays what it is meant to be, whatever the names in it are."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$])")


def text(value: str) -> str:
    r"""`value` as plain words on one line.

    >>> print(text("a|b*c"))
    a\|b\*c
    """
    return _SPECIAL.sub(r"\\\1", _one_line(value))


def code(value: str) -> str:
    r"""`value` as a code span that can stand in a table cell.

    >>> print(code("model.layers.*"), code("a|b"))
    `model.layers.*` `a\|b`
    """
    line = _one_line(value).replace("|", "\\|") or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def link(label: str, address: str) -> str:
    """A link; spaces and brackets in the address are percent-encoded."""
    quoted = re.sub(r"[\s()<>|]", lambda match: f"%{ord(match[0]):02X}", address)
    return f"[{text(label)}]({quoted})"


def fenced(language: str, content: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", content)), default=0))
    return f"{ticks}{language}\n{content.rstrip()}\n{ticks}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown already; columns in `right` are set flush right. Never without rows."""
    assert rows, "a table without rows says nothing"
    assert all(len(row) == len(header) for row in rows), "a row of another width than its header"
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _one_line(value: str) -> str:
    return " ".join(value.split())
