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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
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
    """Progress that nobody sees; its messages are in the log `llmcompress`, at the level INFO."""

    def message(self, text: str) -> None:
        """A line in the log."""
        logging.getLogger("llmcompress").info(text)

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        """A bar that nobody sees."""
        yield _Nothing()


def watched(progress: Progress | bool | None) -> Progress:
    """The progress that a Python call asked for; None: shown where a person watches, a terminal or a notebook."""
    if progress is None:
        progress = sys.stderr.isatty() or _in_notebook()
    return (console() if progress else Silent()) if isinstance(progress, bool) else progress


def _in_notebook() -> bool:
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def console(stream: TextIO | None = None) -> Progress:
    """Progress on stderr (or `stream`): bars on a terminal, lines elsewhere; of several processes the first speaks."""
    if int(os.environ.get("RANK", "0")) > 0:
        return Silent()
    stream = stream or sys.stderr
    widgets = _in_notebook() and find_spec("ipywidgets") is not None  # without them rich draws nothing there
    return Bars() if stream.isatty() or widgets else Lines(stream)


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
def quiet(*libraries: str) -> Iterator[None]:
    """Within the block the loggers of these libraries pass errors only, and the libraries draw no bars of their own.

    All is as before at its end, and bars that anybody else draws with tqdm are not touched: transformers and datasets
    have a switch of their own; in other libraries each module's own name `tqdm` stands for a silent one meanwhile.
    """
    for name in libraries:
        import_module(name)
    loggers = [logging.getLogger(name) for name in libraries]
    with ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        transformers: Any = sys.modules.get("transformers.utils.logging")
        if transformers and transformers.is_progress_bar_enabled():
            transformers.disable_progress_bar()
            stack.callback(transformers.enable_progress_bar)
        datasets: Any = sys.modules.get("datasets.utils")
        if datasets and not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        switched = ("transformers", "datasets")
        for module in [module for name, module in list(sys.modules.items()) if name.split(".")[0] in libraries]:
            bar = module.__dict__.get("tqdm")
            if isinstance(bar, type) and module.__name__.split(".")[0] not in switched:
                stack.callback(module.__dict__.__setitem__, "tqdm", bar)
                module.__dict__["tqdm"] = partial(_silent, bar)
        yield


def _silent(bar: type, *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **{**kwargs, "disable": True})
