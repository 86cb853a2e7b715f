"""One pass over every byte of a checkpoint: who it is, and whether its numbers are numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmcompress.checkpoint.tensors import StoredTensor, torch_dtype


@dataclass(frozen=True, slots=True)
class Scan:
    """identity: sha256 over config, and name, dtype, shape and bytes of every tensor, in the order of names.

    not_finite: tensor name -> how many of its values are NaN or Inf, for those that have any.
    """

    identity: str
    not_finite: dict[str, int]


def scan(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Scan:
    """Read everything once, 16 MiB at a time."""
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    not_finite: dict[str, int] = {}
    for name in sorted(stored):
        tensor = stored[name]
        sha.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        bad = 0
        for chunk in tensor.chunks():
            sha.update(chunk)
            bad += _not_finite(chunk, tensor.dtype)
        if bad:
            not_finite[name] = bad
    return Scan(sha.hexdigest(), not_finite)


def _not_finite(chunk: bytes, dtype: str) -> int:
    import torch

    values = torch.frombuffer(bytearray(chunk), dtype=torch_dtype(dtype))
    if not values.is_floating_point() or values.element_size() == 1:
        return 0
    return int(values.numel() - torch.isfinite(values).sum())
