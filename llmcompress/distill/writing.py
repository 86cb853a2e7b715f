"""A trained student as an ordinary checkpoint folder: weights, config, tokenizer, and what the report says of them.

    plain      save_pretrained in the dtype of the teacher's files
    on grid    the quantized folder it came from, with new codes under the old scales, packed in the same layout

The caller fills a temporary folder and renames it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import read_header, torch_dtype
from llmcompress.checkpoint.source import side_files
from llmcompress.checkpoint.writer import plain_output, write_shards
from llmcompress.console import quiet
from llmcompress.distill.quantized import OnGrid, trained_codes, with_codes
from llmcompress.formats.base import FORMATS
from llmcompress.formats.roundtrip import unpack_codes
from llmcompress.models.meta import FLOATS
from llmcompress.report import LinearRow, Output, RunReport

POOLING_FOLDERS = ("1_Pooling", "2_Normalize")
"""Where a sentence encoder says how it pools; copied with it."""


def write_plain(model: nn.Module, folder: Path, dtype: torch.dtype, beside: Path) -> Output:
    """Save a dense student into `folder`, with the tokenizer files of the checkpoint `beside`."""
    before = next(model.parameters()).dtype
    model.to(dtype)
    with quiet("transformers"):
        model.save_pretrained(folder)  # type: ignore[operator]
    model.to(before)
    _copy_beside(beside, folder)
    files = sorted(path for path in folder.iterdir() if "safetensors" in path.name)
    stored = [tensor for path in files if path.suffix == ".safetensors" for tensor in read_header(path).values()]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return plain_output(folder, digests, stored)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype of most of a checkpoint's bytes."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.stored.values():
        if tensor.dtype in FLOATS:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return torch_dtype(max(sizes, key=sizes.__getitem__))


def write_on_grid(
    model: nn.Module, grids: Mapping[str, OnGrid], student: Checkpoint, folder: Path
) -> tuple[RunReport, float]:
    """Write the student's folder anew with the codes that training ended with.

    Returns: the report of the folder it came from, with its linears and output brought up to date, and the share of
    codes that changed.
    """
    report = RunReport.load(student.folder)
    assert report.output is not None
    format = FORMATS.get(report.output.format)
    dtype = stored_dtype(student) if report.source is None else getattr(torch, report.source.dtype)
    replaced: dict[str, torch.Tensor] = {}
    rows: list[LinearRow] = []
    changed = total = 0
    for row in report.linears:
        if row.name not in grids:
            rows.append(row)
            continue
        grid = grids[row.name]
        codes_OI = trained_codes(model.get_submodule(row.name), grid).cpu()
        before = unpack_codes(student, row, format)
        changed, total = changed + int((codes_OI != before.codes_OI).sum()), total + codes_OI.numel()
        weight = with_codes(before, codes_OI)
        replaced |= {f"{row.tensor_prefix}.{suffix}": tensor for suffix, tensor in format.pack(weight, dtype).items()}
        notes = [*row.notes, "codes trained by distillation on the scales that were there"]
        lost = {"relative_error": None, "error_kind": None}
        rows.append(row.model_copy(update={"digest": weight.digest(), "notes": notes, **lost}))
    digests = _write_tensors(student, replaced, folder)
    _copy_beside(student.folder, folder)
    for name in ("config.json", "quantize_config.json"):
        if (student.folder / name).is_file():
            shutil.copyfile(student.folder / name, folder / name)
    output = report.output.model_copy(
        update={"files": {name: (folder / name).stat().st_size for name in digests}, "digests": digests}
    )
    return report.model_copy(update={"linears": rows, "output": output}), changed / max(total, 1)


def _write_tensors(student: Checkpoint, replaced: Mapping[str, torch.Tensor], folder: Path) -> dict[str, str]:
    from safetensors.torch import save_file

    scratch = folder / ".replaced.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in replaced.items()}, scratch)
    fresh = read_header(scratch)
    tensors = [fresh.get(name, stored) for name, stored in student.stored.items()]
    digests = write_shards(folder, tensors)
    scratch.unlink()
    return digests


def grid_linears(model: nn.Module, student: Checkpoint) -> dict[str, Any]:
    """Name -> the quantized weight of every linear of a student that llmcompress quantized."""
    report = RunReport.load(student.folder)
    assert report.output is not None
    format = FORMATS.get(report.output.format)
    return {row.name: unpack_codes(student, row, format) for row in report.linears if row.outcome != "skipped"}


def _copy_beside(source: Path, folder: Path) -> None:
    for path in side_files(source):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    for name in POOLING_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
