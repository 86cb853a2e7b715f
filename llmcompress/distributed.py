"""The processes of one run, as torchrun or accelerate started them; alone without either. torch is imported on use.

    torchrun --nproc-per-node 2 -m llmcompress quantize ...

In quantization each process takes its share of the calibration rows through every layer. Where a linear is due,
Hessians are added up over all, each process solves its share of the rows of the weight, and all get the whole. Sums are
taken in the order of ranks, so a run repeats to the bit. Rank 0 reports and writes; the others are silent.

A process that dies is noticed at the next exchange: the others name it and leave, and the finished layers stay.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from llmcompress.errors import LLMCompressError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long an exchange waits for a process that is slower."""
ROLL_CALL = timedelta(seconds=5)


class MatrixSum(Protocol):
    """A sum over tokens that every process has a share of: `sum_II`, a float32 tensor [I, I], and its token count."""

    num_tokens: int
    sum_II: Any


def num_processes() -> int:
    """How many processes were launched together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process is the one that reports and writes: the first, or the only one."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


def sharded() -> bool:
    """Whether `accelerate launch` was told to spread one model over the processes (FSDP)."""
    return num_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def leave() -> None:
    """Part from the other processes in order, should this one have joined them.

    Left to the end of the interpreter, threads of the process group may still run when they are torn down, and then
    the process aborts with its work done.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if num_processes() > 1 and distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class ProcessLostError(LLMCompressError):
    """Another process of the run is gone. What was finished is kept."""

    of_this_process = True


@dataclass(frozen=True, slots=True)
class World:
    """`rank`: this process, from 0. `size`: how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> World:
        """The world that the launcher's environment speaks of (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

        Raises: ProcessLostError when the others do not come.
        """
        if num_processes() == 1:
            return cls()
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This process's part of `total` things in a row."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def gather(self, mine: T) -> list[T]:
        """What every process gave, by rank."""
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        found: list[T | None] = [None] * self.size
        with self._naming_the_lost():
            dist.all_gather_object(found, mine)
        return found  # type: ignore[return-value]

    def least(self, number: int) -> int:
        """The least of the numbers that all processes give."""
        return min(self.gather(number))

    def add_up(self, total: MatrixSum) -> None:
        """Make `total` the sum over all processes, the same bits in each: added up by rank at process 0."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        with self._naming_the_lost():
            total.num_tokens = sum(self.gather(total.num_tokens))
            sum_II = total.sum_II.cpu()
            if self.first:
                other_II = torch.empty_like(sum_II)
                for rank in range(1, self.size):
                    dist.recv(other_II, src=rank)
                    sum_II += other_II
            else:
                dist.send(sum_II, dst=0)
            dist.broadcast(sum_II, src=0)
            total.sum_II = sum_II.to(total.sum_II.device)

    def wait(self) -> None:
        """Let no process go on before all are here."""
        self.gather(None)

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """An exchange that fails because a process is gone is a ProcessLostError that names it."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessLostError(
                f"{self._lost() or 'a process of this run'} is gone: {str(error).splitlines()[0][:200]}",
                "the finished layers are kept: the same command goes on from there",
            ) from error

    def _lost(self) -> str:
        """Which process does not answer, as far as this one can tell."""
        import torch.distributed as dist

        if not self.first:
            return "process 0, or one that it waits for,"
        try:
            dist.monitored_barrier(timeout=ROLL_CALL, wait_all_ranks=True)
        except RuntimeError as error:
            text = str(error)
            missing = [str(rank) for rank in range(self.size) if f"rank {rank} " in text.lower() or f"[{rank}" in text]
            return f"process {', '.join(missing)}" if missing else ""
        return ""
