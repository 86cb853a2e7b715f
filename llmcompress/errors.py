"""What a user may see go wrong, and how it is said.

    LLMCompressError            one problem: where, the value, the rule; a hint says what to do
    └── ProblemsError           several problems found in one pass, one line each

`assert` is for our own mistakes; everything a user, a file or a machine can cause is one of these. The command line
prints them without a traceback and leaves with exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class LLMCompressError(Exception):
    """One problem that a user can act on.

    `message` names the place, the value and the rule in one line; `hint` says what to do about it. `of_this_process`:
    where several work together, others need not have met the same.
    """

    of_this_process = False

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def lines(self) -> list[str]:
        """The lines to print: the problem, then the hint on a line of its own."""
        return [self.message] + ([f"hint: {self.hint}"] if self.hint else [])


class ProblemsError(LLMCompressError):
    """Several problems found in one pass; each keeps its own line and hint."""

    def __init__(self, problems: Sequence[LLMCompressError]) -> None:
        assert problems, "an error without a problem"
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = tuple(problems)

    def lines(self) -> list[str]:
        """Every problem's lines, in the order found."""
        return [line for problem in self.problems for line in problem.lines()]


def raise_all(problems: Sequence[LLMCompressError]) -> None:
    """Raise nothing, the one problem, or all of them together.

    Raises: LLMCompressError for one problem, ProblemsError for several.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ProblemsError(problems)


@contextmanager
def collected(problems: list[LLMCompressError], prefix: str = "") -> Iterator[None]:
    """Within the block an error that a user can mend joins `problems`, its message behind `prefix`, and ends the block.

    >>> problems = []
    >>> with collected(problems, "scheme: "):
    ...     raise LLMCompressError("no such grid")
    >>> problems[0].message
    'scheme: no such grid'
    """
    try:
        yield
    except ProblemsError as error:
        problems.extend(LLMCompressError(prefix + problem.message, problem.hint) for problem in error.problems)
    except LLMCompressError as error:
        problems.append(LLMCompressError(prefix + error.message, error.hint))


def unknown(kind: str, name: str, known: Iterable[str], where: str | None = None) -> LLMCompressError:
    """The error for a name nobody knows, with the nearest known one.

    >>> unknown("scheme", "W4A61", ["W4A16", "NF4"]).lines()
    ["unknown scheme 'W4A61'; known: NF4, W4A16", "hint: did you mean 'W4A16'?"]
    """
    names = sorted(known)
    prefix = f"{where}: " if where else ""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else None
    return LLMCompressError(f"{prefix}unknown {kind} {name!r}; known: {', '.join(names)}", hint)


def shown(text: object, most: int = 80) -> str:
    """A name or value from a file that somebody else wrote, fit for one line of a terminal: escaped, and cut.

    >>> shown("layer\\x1b[2J\\n.weight")
    'layer\\\\x1b[2J\\\\n.weight'
    """
    start = str(text)[: most + 1]
    escaped = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in start[:most])
    return escaped + "…" * (len(start) > most)


@contextmanager
def third_party(problem: str, hint: str | None = None) -> Iterator[None]:
    """Whatever a library raises inside becomes one LLMCompressError: `problem`, then its first line in brackets.

    For calls into others' code on files: what those raise has no common base (a StrictDataclass error, KeyError,
    ZeroDivisionError, RecursionError and MemoryError have all been seen while a checkpoint is loaded). Ours pass
    through as they are; `problem` names the file or folder.

    >>> with third_party("model/config.json: not a config"):
    ...     1 / 0
    Traceback (most recent call last):
    llmcompress.errors.LLMCompressError: model/config.json: not a config (ZeroDivisionError: division by zero)
    """
    try:
        yield
    except LLMCompressError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError):
            hint = "there is not enough memory for it"
        raise LLMCompressError(f"{problem} ({first_line(error)})", hint) from error


def first_line(error: BaseException) -> str:
    """An exception's kind and the first line of its text, at most 300 characters.

    >>> first_line(ValueError("no such rope")), first_line(RecursionError())
    ('ValueError: no such rope', 'RecursionError')
    """
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
