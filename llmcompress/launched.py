"""Which of several processes this is, as torchrun or accelerate say it in the environment. Free of torch.

One process speaks to the user and writes; what the others find is the same.
"""

from __future__ import annotations

import os


def num_processes() -> int:
    """How many processes were launched together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process is the one that reports and writes: the first, or the only one."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


def sharded() -> bool:
    """Whether `accelerate launch` was told to spread one model over the processes (FSDP)."""
    return num_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
