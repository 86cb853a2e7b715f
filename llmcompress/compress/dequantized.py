"""Our own reader: a checkpoint that we wrote, as a plain dense transformers model.

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
from llmcompress.models.blocks import put_weight_OI
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
