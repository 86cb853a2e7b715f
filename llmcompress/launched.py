"""Which of several processes this is, as torchrun or accelerate say it in the environment. Free of torch.

One process speaks to the user and writes; what the others find is the same.
"""

from __future__ import annotations

import os
import sys
from typing import Any


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
