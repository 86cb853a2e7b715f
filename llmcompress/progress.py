"""How long work says where it stands, without knowing who listens.

A stage receives a `Progress` and reports steps; the command line draws a bar on stderr, a test or a library caller
passes `Silent`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """One bar under way."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """`amount` more units are done; `note` is a few words on the present one."""
        ...


class Progress(Protocol):
    """Where long work reports."""

    def message(self, text: str) -> None:
        """One line for the person watching."""
        ...

    def step(self, title: str, total: int) -> AbstractContextManager[Step]:
        """A bar of `total` units, open for the length of a with block."""
        ...


class _Nothing:
    def advance(self, amount: int = 1, note: str = "") -> None:
        """Say nothing."""


class Silent:
    """Progress that nobody sees."""

    def message(self, text: str) -> None:
        """Say nothing."""

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        """A bar that nobody sees."""
        yield _Nothing()
