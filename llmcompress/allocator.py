"""Freed memory handed back to the system, so that resident memory is what is in use.

The C library keeps freed blocks of up to 32 megabytes for later. In a loop that reads, solves and drops a layer after
another, a few small lasting objects between them are enough to leave holes that the next layer's blocks do not fit in:

    heap:   [ freed 25 MB ][.][ freed 9 MB ][.][ freed 16 MB ][.][ the next 25 MB, on top ]

So large blocks are kept out of the heap (`large_blocks_mapped`), and what is free in it is returned after every layer
(`give_back`). Both do nothing on other C libraries than glibc.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

M_MMAP_THRESHOLD = -3
LARGE_BYTES = 1 << 20
USUAL_BYTES = 32 << 20
"""Where the threshold ends up by itself, since freeing a block raises it to that block's size, up to this."""


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Take blocks of a mebibyte or more from the system, and return them when they are freed (mallopt).

    Every block then comes as pages to be filled anew, which training, with its many short-lived ones, would pay for: so
    only within. A threshold that the user gave in the environment (MALLOC_MMAP_THRESHOLD_) stays.
    """
    mallopt = None if "MALLOC_MMAP_THRESHOLD_" in os.environ else _of_c("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, USUAL_BYTES)


def give_back() -> None:
    """Return every free page of the heap to the system (malloc_trim)."""
    trim = _of_c("malloc_trim")
    if trim is not None:
        trim(0)


@cache
def _of_c(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
