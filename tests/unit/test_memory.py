"""Where blocks of memory come from, by the C library's own count (mallinfo2)."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import ctypes
    from llmcompress import memory
    from llmcompress.memory import large_blocks_kept, large_blocks_mapped, managed

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Info
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]

    def mapped(num_bytes):
        before = libc.mallinfo2().hblks
        block = libc.malloc(ctypes.c_size_t(num_bytes))
        after = libc.mallinfo2().hblks
        libc.free(block)
        return after - before

    called = []
    libc_mallopt, memory._of_c = memory._of_c, lambda name: called.append(name)
    with large_blocks_mapped(), large_blocks_kept():  # nobody said that the process is ours
        print(len(called))
    memory._of_c = libc_mallopt
    with managed():
        print(mapped(2 << 20), mapped(1 << 16))
        with large_blocks_kept():
            print(mapped(2 << 20), mapped(64 << 20))
        print(mapped(2 << 20))
    print(mapped(2 << 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_large_blocks_are_mapped_within_and_only_within() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, check=True, env={}
    )
    assert done.stdout.split() == ["0", "1", "0", "0", "1", "1", "0"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_a_threshold_from_the_environment_stays() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, check=True,
        env={"MALLOC_MMAP_THRESHOLD_": str(1 << 15)},
    )  # fmt: skip
    assert done.stdout.split() == ["0", *["1"] * 6]
