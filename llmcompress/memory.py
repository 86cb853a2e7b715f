"""Freed memory handed back to the system, so that resident memory is what is in use.

The C library keeps freed blocks of up to 32 megabytes for later. In a loop that reads, solves and drops a layer after
another, a few small lasting objects between them are enough to leave holes that the next layer's blocks do not fit in:

    heap:   [ freed 25 MB ][.][ freed 9 MB ][.][ freed 16 MB ][.][ the next 25 MB, on top ]

So large blocks are kept out of the heap (`large_blocks_mapped`), from the start of the command, for holes that imports
leave would be filled too; and what is free in the heap is returned before and after every solution (`give_back`). Both
do nothing on other C libraries than glibc.

The threshold is a property of the process, so only the command line moves it, within `managed`; anywhere else
`large_blocks_mapped` and `large_blocks_kept` do nothing.

A mapped block comes as pages to be filled anew. Quantization keeps that at a few percent of its time with small batches
of text, whose activations stay below the size; training and evaluation keep their blocks (`large_blocks_kept`).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3
LARGE_BYTES = 1 << 20
USUAL_BYTES = 32 << 20
"""Where the threshold ends up by itself, since freeing a block raises it to that block's size, up to this."""
_thresholds: list[int] = []
"""Those in force, the innermost last; empty where nobody said that this process is ours (`managed`)."""


@contextmanager
def managed() -> Iterator[None]:
    """Let this module set the process's threshold, and begin with large blocks mapped: for the command line alone."""
    _thresholds.append(USUAL_BYTES)
    try:
        with large_blocks_mapped():
            yield
    finally:
        _thresholds.pop()


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Take blocks of a mebibyte or more from the system, and return them when they are freed (mallopt).

    A threshold that the user gave in the environment (MALLOC_MMAP_THRESHOLD_) stays.
    """
    with _threshold(LARGE_BYTES):
        yield


@contextmanager
def large_blocks_kept() -> Iterator[None]:
    """Let the heap have blocks of up to 32 MiB again, within `large_blocks_mapped`."""
    with _threshold(USUAL_BYTES):
        yield


@contextmanager
def _threshold(num_bytes: int) -> Iterator[None]:
    managed_here = _thresholds and "MALLOC_MMAP_THRESHOLD_" not in os.environ
    mallopt = _of_c("mallopt") if managed_here else None
    if mallopt is None:
        yield
        return
    _thresholds.append(num_bytes)
    mallopt(M_MMAP_THRESHOLD, num_bytes)
    try:
        yield
    finally:
        _thresholds.pop()
        mallopt(M_MMAP_THRESHOLD, _thresholds[-1])


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


def available_bytes() -> int | None:
    """What this process may still take: the least that the system, its control group and its own limit leave.

    None where the system does not say.
    """
    left = [value for value in (_system_bytes(), _group_bytes(), _limit_bytes()) if value is not None]
    return max(0, min(left)) if left else None


def _system_bytes() -> int | None:
    return _first_number(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB", 1024)


def _group_bytes() -> int | None:
    """Of the control group that a container gives (version 2)."""
    folder = Path("/sys/fs/cgroup")
    most, used = (_first_number(folder / name, r"^(\d+)$") for name in ("memory.max", "memory.current"))
    return most - used if most is not None and used is not None else None


def _limit_bytes() -> int | None:
    """Of the address space, by `ulimit -v`."""
    try:
        import resource
    except ImportError:  # not on this system
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _first_number(Path("/proc/self/status"), r"VmSize:\s+(\d+) kB", 1024)
    return most - used if most != resource.RLIM_INFINITY and used is not None else None


def _first_number(path: Path, pattern: str, unit: int = 1) -> int | None:
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * unit if match else None
