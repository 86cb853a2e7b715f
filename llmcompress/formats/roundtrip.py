"""From disk: every linear of a written folder unpacked again and held against what the solver returned, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import TensorFiles
from llmcompress.compress.scheme import Scheme, WeightGrid
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import FORMATS, Format
from llmcompress.report import LinearRow

if TYPE_CHECKING:
    import torch

    from llmcompress.compress.weight import CompressedWeight, QuantizedWeight


def row_scheme(row: LinearRow) -> Scheme:
    """What became of the linear that a report row speaks of; not for a skipped one."""
    assert row.grid is not None, "a skipped linear has no scheme"
    return Scheme(WeightGrid(**row.grid))  # type: ignore[arg-type]


def unpack_row(source: Checkpoint | TensorFiles, row: LinearRow, format: Format) -> CompressedWeight:
    """The linear that a report row speaks of, read from files that we wrote.

    Raises: LLMCompressError naming a tensor that is missing or misshapen.
    """
    scheme = row_scheme(row)
    tensors: dict[str, torch.Tensor] = {}
    for suffix in format.suffixes(scheme):
        name = f"{row.tensor_prefix}.{suffix}"
        if name not in source.stored:
            raise LLMCompressError(f"{source.folder}: tensor {name} is missing")
        tensors[suffix] = source.tensor(name)
    return format.unpack(tensors, scheme, *row.shape)


def unpack_codes(source: Checkpoint | TensorFiles, row: LinearRow, format: Format) -> QuantizedWeight:
    """The same where the scheme is known to be a grid of weights."""
    from llmcompress.compress.weight import QuantizedWeight

    weight = unpack_row(source, row, format)
    assert isinstance(weight, QuantizedWeight), f"{row.name} has no codes"
    return weight


def mismatches(folder: Path, format_name: str, rows: Iterable[LinearRow]) -> list[str]:
    """Names of compressed linears whose stored values differ from the solver's digest."""
    checkpoint, format = Checkpoint.open(folder), FORMATS.get(format_name)
    return [
        row.name
        for row in rows
        if row.outcome != "skipped" and unpack_row(checkpoint, row, format).digest() != row.digest
    ]
