"""Freed memory handed back to the system, so that resident memory is what is in use.

The C library keeps freed blocks of up to 32 megabytes for later. In a loop that reads, solves and drops a layer after
another, a few small lasting objects between them are enough to leave holes that the next layer's blocks do not fit in:

    heap:   [ freed 25 MB ][.][ freed 9 MB ][.][ freed 16 MB ][.][ the next 25 MB, on top ]

So large blocks are kept out of the heap (`map_large_blocks`), and what is free in it is returned after every layer
(`give_back`). Both do nothing on other C libraries than glibc.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

M_MMAP_THRESHOLD = -3
LARGE_BYTES = 1 << 20


def map_large_blocks() -> None:
    """From now on, take a block of a mebibyte or more from the system, and return it when it is freed (mallopt).

    A threshold that the user gave in the environment (MALLOC_MMAP_THRESHOLD_) stays.
    """
    mallopt = _of_c("mallopt")
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


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
