"""A merged checkpoint, tensor by tensor, from file to file; then every merged linear read back.

    MODEL's shards ──> untouched tensors: bytes copied ───────────────────────────┐
                  └──> linears: dense W (+ NF4 round trip) + updates, rounded ────┴──> OUT's shards ──> read back

A merged tensor is computed when the writer asks for it and forgotten when it is written, so memory holds one linear and
not the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import DTYPE_BYTES, dtype_name, torch_dtype
from llmcompress.checkpoint.source import side_files
from llmcompress.checkpoint.writer import Streamed, write_shards
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError
from llmcompress.finetune.adapter import Adapter
from llmcompress.finetune.merge_target import Linear, MergePlan
from llmcompress.finetune.update import merged_weight, probe_excess
from llmcompress.report import MergedLinear

PROBE_SEED = 0


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is computed when the writer comes to it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Any

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def chunks(self) -> Iterator[bytes]:
        """Its values as they lie in a file, in one piece."""
        value = self.make().contiguous()
        assert tuple(value.shape) == self.shape, f"{self.name}: {list(value.shape)} computed, {self.shape} declared"
        yield value.view(torch.uint8).numpy().tobytes() if value.dim() else bytes(value.view(torch.uint8).numpy())


def write_merged(
    plan: MergePlan, folder: Path, onto: str, progress: Progress, *, without_updates: bool = False
) -> tuple[list[Streamed], dict[str, str]]:
    """Write the checkpoint merged onto these weights; returns its tensors and the digests of its files.

    without_updates: only the weights that would be merged onto.
    """
    source, target = plan.target.source, plan.target
    used = MergePlan(target, [], onto, plan.trained, None) if without_updates else plan
    changed = {linear.tensor: linear for linear in used.updated(onto).values()}
    whole = {
        target.parameters[name]: (adapter, tensor)
        for adapter in (() if without_updates else plan.adapters)
        for name, tensor in adapter.whole.items()
    }
    codes = tuple(f"{linear.row.tensor_prefix}." for linear in target.linears.values() if linear.row is not None)
    tensors: list[Streamed] = []
    with progress.step("merging", len(changed)) as bar:
        for name, stored in source.stored.items():
            if name in whole:
                adapter, tensor = whole[name]
                make = partial(_replacement, adapter, tensor, stored.dtype)
                tensors.append(ComputedTensor(name, stored.dtype, stored.shape, make))
            elif name not in changed and not name.startswith(codes or ("\0",)):
                tensors.append(stored)
        for tensor_name, linear in changed.items():
            rows, columns = linear.shape
            shape = (columns, rows) if linear.transposed else (rows, columns)
            dtype = dtype_name(target.dtype(linear))
            tensors.append(ComputedTensor(tensor_name, dtype, shape, partial(_merged, used, linear, onto, bar)))
        folder.mkdir(parents=True, exist_ok=True)
        digests = write_shards(folder, tensors)
    for path in side_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tensors, digests


def _merged(plan: MergePlan, linear: Linear, onto: str, bar: Any) -> torch.Tensor:
    value = plan.weight(linear, onto)
    bar.advance(1, linear.name)
    return value.t().contiguous() if linear.transposed else value


def _replacement(adapter: Adapter, tensor: str, dtype: str) -> torch.Tensor:
    return adapter.stored[tensor].load().to(torch_dtype(dtype))


def check_linears(plan: MergePlan, folder: Path, progress: Progress) -> list[MergedLinear]:
    """Every updated linear read back, its outputs held against base plus adapter."""
    made = Checkpoint.open(folder)
    names = [name for name in plan.target.linears if any(name in adapter.parts for adapter in plan.adapters)]
    rows = []
    with progress.step("checking merged linears", len(names)) as bar:
        for name in names:
            linear = plan.target.linears[name]
            merged = made.tensor(linear.tensor)
            merged_OI = merged.t() if linear.transposed else merged
            base_OI = plan.base(linear, plan.onto)
            updates = plan.updates(name)
            change_OI = merged_weight(base_OI, updates) - base_OI.double()
            size = float(torch.linalg.norm(base_OI.double())) or 1.0
            rows.append(
                MergedLinear(
                    name=name,
                    rank=sum(update.rank for update in updates),
                    relative_update=float(torch.linalg.norm(change_OI)) / size,
                    error_over_rounding=probe_excess(merged_OI, base_OI, updates, PROBE_SEED),
                )
            )
            bar.advance(1, name)
    wrong = [row for row in rows if not row.error_over_rounding <= 1]
    if wrong:
        raise LLMCompressError(
            f"{len(wrong)} of {len(rows)} merged linears are not base plus adapter ({wrong[0].name} errs "
            f"{wrong[0].error_over_rounding:.3g} times as much as rounding can)",
            "an update too large for the dtype of the file, or a fault of the disk or its memory; run again",
        )
    return rows
