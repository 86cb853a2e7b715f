"""Where tensors are computed: the accelerator if there is one, else the processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def best() -> torch.device:
    """cuda where there is one, else cpu."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
