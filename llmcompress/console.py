"""How long work says where it stands, and what a person at the terminal sees of it.

A stage receives a `Progress` and reports steps to it; who listens is not its concern: the command line draws bars with
the time left on stderr (plain lines where there is no terminal), a program that asked for nothing gets `Silent`.
Everything goes to stderr; stdout is for data. Bars may lie inside one another; messages appear above them.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_S = 10.0
"""Where lines stay, a step speaks at most this often."""


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


def console(stream: TextIO | None = None) -> Progress:
    """Progress on stderr (or `stream`): bars on a terminal, lines elsewhere; of several processes the first speaks."""
    if int(os.environ.get("RANK", "0")) > 0:
        return Silent()
    stream = stream or sys.stderr
    return Bars() if stream.isatty() else Lines(stream)


class Lines:
    """Plain lines: the start of a step, where it stands now and then, and its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def message(self, text: str) -> None:
        """One line."""
        print(text, file=self._stream, flush=True)

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        """A step of `total` units; its end is said only when it was reached."""
        counter = _Counter(self, title, total)
        self.message(f"{title}: {total} to do")
        yield counter
        self.message(f"{title}: done in {duration(time.monotonic() - counter.began)}")


class _Counter:
    def __init__(self, lines: Lines, title: str, total: int) -> None:
        self._lines, self._title, self._total = lines, title, total
        self._done = 0
        self.began = self._spoke = time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count, and speak when the last line is old enough."""
        self._done += amount
        now = time.monotonic()
        if now - self._spoke >= PLAIN_INTERVAL_S and self._done < self._total:
            self._spoke = now
            left = (now - self.began) / self._done * (self._total - self._done)
            self._lines.message(f"{self._title}: {self._done} of {self._total}, {duration(left)} left  {note}".rstrip())


class Bars:
    """Rich's bars on stderr; one display, however deep the steps."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._depth = 0
        self._rich: RichProgress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )

    def message(self, text: str) -> None:
        """One line, above the bars."""
        self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, title: str, total: int) -> AbstractContextManager[Step]:
        """A bar of `total` units; it stays on the screen when it is done."""
        return self._step(title, total)

    @contextmanager
    def _step(self, title: str, total: int) -> Iterator[Step]:
        task = self._rich.add_task(title, total=total, note="")
        self._depth += 1
        if self._depth == 1:
            self._rich.start()
        try:
            yield _Bar(self._rich, task)
        finally:
            self._rich.update(task, note="")
            self._depth -= 1
            if self._depth == 0:
                self._rich.stop()
                for finished in self._rich.task_ids:
                    self._rich.remove_task(finished)


class _Bar:
    def __init__(self, rich: RichProgress, task: TaskID) -> None:
        self._rich, self._task = rich, task

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Move the bar."""
        self._rich.update(self._task, advance=amount, note=note)


def megabytes(num_bytes: int) -> str:
    """Decimal units, three digits.

    >>> megabytes(2_236_064), megabytes(14_483_464_192)
    ('2.24 MB', '14.5 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Time as a person says it.

    >>> duration(0.4), duration(75), duration(3 * 3600 + 120)
    ('0.4 s', '1 min 15 s', '3 h 2 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Within the block no tqdm bar is drawn and the named loggers pass errors only; both come back at its end."""
    bar: Any = import_module("tqdm").tqdm
    start = bar.__init__
    levels = {name: logging.getLogger(name).level for name in loggers}

    def disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    bar.__init__ = disabled
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        bar.__init__ = start
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
