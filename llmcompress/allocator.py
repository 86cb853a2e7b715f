"""Freed memory handed back to the system, so that resident memory is what is in use.

The C library keeps freed blocks of up to some megabytes for later. In a loop that reads, solves and drops a layer after
another, a few small lasting objects between them are enough to leave a layer's worth behind at every turn.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Return every free page to the system (glibc's malloc_trim); does nothing on other C libraries."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
