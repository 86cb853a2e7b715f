"""Reading ahead and writing behind, so that the disk works while the processor does.

    disk:       read layer 1 ...        │ read layer 2 ...        │ write layer 1, read layer 3 ...
    processor:  ─────────  layer 0 ─────┴──────── layer 1 ────────┴──────── layer 2 ──────── ...

One thread each, with a bound on what lies in memory: one layer (256 MiB at most) read and not yet asked for, one layer
not yet written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from llmcompress.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    import torch

AHEAD_BYTES = 256 << 20


class ReadAhead:
    """Tensors of a checkpoint, those expected next already on their way."""

    def __init__(self, source: Checkpoint, expected: Iterable[str], ahead_bytes: int) -> None:
        self._source, self._expected = source, deque(expected)
        self._most = min(ahead_bytes, AHEAD_BYTES)
        self._coming: dict[str, Future[torch.Tensor]] = {}
        self._bytes = 0
        self._thread = ThreadPoolExecutor(1, "reading")

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype; handed out once, and read anew if asked for again."""
        coming = self._coming.pop(name, None)
        if coming is not None:
            self._bytes -= self._source.stored[name].num_bytes
        self._top_up()
        return self._source.tensor(name) if coming is None else coming.result()

    def _top_up(self) -> None:
        while self._expected:
            size = self._source.stored[self._expected[0]].num_bytes
            if self._coming and self._bytes + size > self._most:
                return
            name = self._expected.popleft()
            self._bytes += size
            self._coming[name] = self._thread.submit(self._source.tensor, name)

    def close(self) -> None:
        """Read no further."""
        self._expected.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)


class WriteBehind:
    """One piece of writing at a time, while the caller goes on; its error surfaces at the next one, or at the end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writing")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Write when what came before is written, which is waited for."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Until everything is written. Raises: what the writing raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def close(self) -> None:
        """Let what was begun be finished."""
        self._thread.shutdown(wait=True)
