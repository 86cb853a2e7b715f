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


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return shown(lines[0], 200) if lines else type(error).__name__


@contextmanager
def third_party(what: str, hint: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises while it reads what a user gave into one problem; `what` names file and step.

    transformers, tokenizers, datasets, torch and the operating system raise dozens of classes over a broken file, and
    none of them is a reason for a traceback. The original stays as the cause.

    Raises: LLMCompressError.
    """
    try:
        yield
    except LLMCompressError:
        raise
    except Exception as error:
        raise LLMCompressError(f"{what} ({type(error).__name__}: {first_line(error)})", hint) from error
