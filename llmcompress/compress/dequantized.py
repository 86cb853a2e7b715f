"""Our own reader: a checkpoint that we wrote, as a plain dense transformers model, whole or a layer at a time.

It serves where an engine is not installed, and as the yardstick that an engine's own reading is held against.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import FORMATS
from llmcompress.formats.roundtrip import unpack_row
from llmcompress.models import meta as skeleton
from llmcompress.models.blocks import is_transposed, put_weight_OI
from llmcompress.models.experts import sliced
from llmcompress.models.loading import best_device
from llmcompress.models.streamed import KEEP_BYTES, CheckpointWeights, StreamedModel
from llmcompress.report import PLAIN, RunReport


def load_dequantized(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of an output folder, every quantized linear holding the weight its codes stand for, in `dtype`.

    Raises: LLMCompressError when the folder has no report of ours, or a tensor is missing.
    """
    report, checkpoint = RunReport.load(folder), Checkpoint.open(folder)
    if report.output is None:
        raise LLMCompressError(f"{folder}: its report names no quantized checkpoint")
    format = None if report.output.format == PLAIN else FORMATS.get(report.output.format)
    model = skeleton.build(checkpoint, quantized=format is not None)
    checkpoint = sliced(checkpoint, model)
    rows = {row.name: row for row in report.linears if row.outcome != "skipped"}
    sources = skeleton.stored_names(model, checkpoint.stored)
    lacking, alone = set(), {name for name, _ in model.named_parameters()}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if format is not None and path in rows and leaf == "weight":
            dense_OI = unpack_row(checkpoint, rows[path], format).dequantize(dtype)
            put_weight_OI(model.get_submodule(path), dense_OI)
            continue
        stored = sources.get(name)
        if stored is not None:
            skeleton.set_parameter(model, name, checkpoint.tensor(stored).to(dtype))
        elif name in alone - skeleton.tied_parameters(model):
            raise LLMCompressError(f"{folder}: no tensor for {name} {list(parameter.shape)}")
        else:
            lacking.add(name)
    skeleton.tie(model, lacking)
    return model.eval()


class DequantizedWeights:
    """The weights of an output folder, those of quantized linears unpacked as they are read (`models.streamed`)."""

    def __init__(self, checkpoint: Checkpoint, report: RunReport, model: nn.Module, dtype: torch.dtype) -> None:
        assert report.output is not None
        self._checkpoint, self._format, self._dtype = checkpoint, FORMATS.get(report.output.format), dtype
        self._rows = {f"{row.name}.weight": row for row in report.linears if row.outcome != "skipped"}
        self._transposed = {f"{path}.weight" for path, module in model.named_modules() if is_transposed(module)}
        self._plain = CheckpointWeights(checkpoint, model)

    def has(self, name: str) -> bool:
        """See `Weights`."""
        return name in self._rows or self._plain.has(name)

    def read(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        if name not in self._rows:
            return self._plain.read(name)
        dense_OI = unpack_row(self._checkpoint, self._rows[name], self._format).dequantize(self._dtype)
        return dense_OI.t().contiguous() if name in self._transposed else dense_OI


def stream_dequantized(folder: Path, dtype: torch.dtype = torch.float32, keep_bytes: int = KEEP_BYTES) -> StreamedModel:
    """What `load_dequantized` loads, a layer at a time; of plain weights, those weights.

    Raises: LLMCompressError when the folder has no report of ours, or a tensor is missing.
    """
    report, checkpoint = RunReport.load(folder), Checkpoint.open(folder)
    if report.output is None:
        raise LLMCompressError(f"{folder}: its report names no quantized checkpoint")
    if report.output.format == PLAIN:
        model = skeleton.build(checkpoint)
        return StreamedModel(model, CheckpointWeights(checkpoint, model), best_device(), dtype, keep_bytes)
    model = skeleton.build(checkpoint, quantized=True)
    weights = DequantizedWeights(checkpoint, report, model, dtype)
    return StreamedModel(model, weights, best_device(), dtype, keep_bytes)
