"""Hidden states between layers, in memory or in one file.

    128 rows of 2048 tokens at width 4096 are 4 GB in float32

Beyond a bound they live in a file of fixed places, read and written a batch at a time with pread and pwrite. A mapping
of that file would do the same, but its pages count as resident memory and its length against an address-space limit.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one batch's hidden state in the file."""

    file: BinaryIO
    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def read(self) -> torch.Tensor:
        """The hidden state, in memory of its own."""
        hidden = torch.empty(self.shape, dtype=self.dtype)
        view = _bytes(hidden)
        done = 0
        while done < len(view):
            num_read = os.preadv(self.file.fileno(), [view[done:]], self.start + done)
            assert num_read > 0, "the file of activations ends early"
            done += num_read
        return hidden.to(self.device)

    def write(self, hidden: torch.Tensor) -> None:
        """Put another hidden state of the same shape in its place."""
        assert hidden.shape == self.shape, "a layer changed the shape of its hidden state"
        view = _bytes(hidden.detach().to("cpu", self.dtype).contiguous())
        done = 0
        while done < len(view):
            done += os.pwrite(self.file.fileno(), view[done:], self.start + done)


def _bytes(tensor: torch.Tensor) -> memoryview:
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


class ActivationFile:
    """A file without a name, gone when the process is; slots are handed out one after the other."""

    def __init__(self, folder: Path) -> None:
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as its slots
        self._end = 0

    def slot(self, hidden: torch.Tensor) -> Slot:
        """A place holding `hidden`."""
        slot = Slot(self._file, self._end, hidden.shape, hidden.dtype, hidden.device)
        self._end += prod(hidden.shape) * hidden.element_size()
        slot.write(hidden)
        return slot
