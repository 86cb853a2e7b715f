"""From disk: every linear of a written folder unpacked again and held against what the solver returned, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import FORMATS, Format
from llmcompress.report import LinearRow


def unpack_linear(
    checkpoint: Checkpoint, stem: str, format: Format, scheme: WeightScheme, out_features: int, in_features: int
) -> QuantizedWeight:
    """One linear's codes and scales, read from a checkpoint we wrote; `stem`: its tensors' common prefix.

    Raises: LLMCompressError naming a tensor that is missing or misshapen.
    """
    tensors: dict[str, torch.Tensor] = {}
    for suffix in format.suffixes(scheme):
        name = f"{stem}.{suffix}"
        if name not in checkpoint.stored:
            raise LLMCompressError(f"{checkpoint.folder}: tensor {name} is missing")
        tensors[suffix] = checkpoint.tensor(name)
    return format.unpack(tensors, scheme, out_features, in_features)


def unpack_row(checkpoint: Checkpoint, row: LinearRow, format: Format) -> QuantizedWeight:
    """The linear that a report row speaks of; see `unpack_linear`."""
    assert row.grid is not None and row.stem is not None, "a skipped linear has no codes"
    return unpack_linear(checkpoint, row.stem, format, WeightScheme(**row.grid), *row.shape)  # type: ignore[arg-type]


def mismatches(folder: Path, format_name: str, rows: Iterable[LinearRow]) -> list[str]:
    """Names of quantized linears whose stored codes, scales or zero points differ from the solver's digest."""
    checkpoint, format = Checkpoint.open(folder), FORMATS.get(format_name)
    return [
        row.name
        for row in rows
        if row.outcome != "skipped" and unpack_row(checkpoint, row, format).digest() != row.digest
    ]
