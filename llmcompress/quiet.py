"""Keep the libraries' own progress bars and log lines off the terminal, which has bars of ours.

Every library that draws a bar here (transformers, datasets, lm-eval, compressed-tensors) draws it with tqdm, so one
place turns them all off, whatever their callers ask for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


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
