"""The merge stage: adapters into weights, tensor by tensor, from file to file.

    MODEL's shards ──> untouched tensors: bytes copied ───────────────────────────┐
                  └──> linears: dense W (+ NF4 round trip) + updates, rounded ────┴──> OUT's shards ──> read back

A merged tensor is computed when the writer asks for it and forgotten when it is written, so memory holds one linear and
not the model. Then every linear is read back, and its outputs on random inputs are held against base plus adapter.

Merging onto the weights that the adapter was trained on matters for QLoRA: it learned to make up for what NF4 lost, and
on the original weights that correction is an error. Which of the two is closer to the trained model is measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import DTYPE_BYTES, dtype_name, torch_dtype
from llmcompress.checkpoint.source import side_files
from llmcompress.checkpoint.writer import Streamed, file_digests, give_name, plain_output, write_shards
from llmcompress.compress.assemble import describe_source
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.data.records import is_file
from llmcompress.data.settings import DataSettings
from llmcompress.errors import LLMCompressError
from llmcompress.finetune.adapter import CONFIG, WEIGHTS, Adapter
from llmcompress.finetune.delta import merged_weight, probe_excess
from llmcompress.finetune.onto import Linear, Target, open_target, require_fit, trained_on
from llmcompress.finetune.settings import AdapterRef, MergeSettings
from llmcompress.models import meta as skeleton
from llmcompress.report import Check, Finetune, Merge, MergedAdapter, MergedLinear, RunReport

PROBE_SEED = 0


@dataclass(frozen=True)
class _Computed:
    """A tensor that is computed when the writer comes to it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Any

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def chunks(self) -> Iterator[bytes]:
        value = self.make().contiguous()
        assert tuple(value.shape) == self.shape, f"{self.name}: {list(value.shape)} computed, {self.shape} declared"
        yield value.view(torch.uint8).numpy().tobytes() if value.dim() else bytes(value.view(torch.uint8).numpy())


@dataclass(frozen=True)
class Plan:
    """What is merged into what. `onto`: dequantized or original; `trained`: what is known of the training."""

    target: Target
    adapters: list[Adapter]
    onto: str
    trained: Finetune | None
    data: DataSettings | None

    def updated(self, onto: str) -> dict[str, Linear]:
        """Every linear whose weight changes when merging `onto` these weights."""
        changed = {name for adapter in self.adapters for name in adapter.parts}
        if onto == "dequantized":
            changed |= set(self.target.plan.linears)
        return {
            name: linear for name, linear in self.target.linears.items() if name in changed or linear.row is not None
        }

    def weight(self, linear: Linear, onto: str) -> torch.Tensor:
        """The merged weight [O, I] in the dtype of the file."""
        base_OI = self.target.dense(linear, onto == "dequantized")
        updates = [adapter.update(linear.name) for adapter in self.adapters if linear.name in adapter.parts]
        if not updates:
            return base_OI.to(self.target.dtype(linear))
        return merged_weight(base_OI, updates).to(self.target.dtype(linear))


def plan_merge(source: Checkpoint, references: Sequence[AdapterRef], onto: str, data: DataSettings | None) -> Plan:
    """Read the adapters' configs and headers and hold them against the checkpoint.

    Raises: LLMCompressError, all problems together.
    """
    if not references:
        raise LLMCompressError("merge: no adapter is given", "name one in merge.adapters, or put finetune before it")
    adapters = [Adapter.open(one.path, one.weight) for one in references]
    known = [part for part in (trained_on(adapter.folder) for adapter in adapters) if part is not None]
    trained = known[0] if known else None
    target, resolved = open_target(source, trained, onto)
    require_fit(target, adapters)
    return Plan(target, adapters, resolved, trained, data or _data_of(adapters))


def merge(
    source: Checkpoint, adapter: Path | None, out: Path, settings: MergeSettings, *, seed: int, key: str,
    report: RunReport, progress: Progress,
) -> RunReport:  # fmt: skip
    """Merge adapters (those of the settings, or the one that the stage before trained) into `source`, as `out`.

    Raises: LLMCompressError for anything a user can mend, and when a linear on disk is not base plus adapter.
    """
    references = settings.adapters or ([AdapterRef(path=str(adapter))] if adapter else [])
    plan = plan_merge(source, references, settings.onto, settings.data)
    source.require_finite()
    report.source = report.source or describe_source(source, skeleton.build(source, quantized=plan.target.plan.stored))
    report.finetune = report.finetune or plan.trained
    workspace = Workspace.open(out, key)
    folder = workspace.final
    try:
        written, digests = write_merged(plan, folder, plan.onto, progress)
        rows = _check_linears(plan, folder, progress)
    except LLMCompressError:
        workspace.discard()
        raise
    report.output = plain_output(folder, digests, written)
    report.checks = [_linear_check(rows)]
    report.merge = Merge(
        onto=plan.onto,
        adapters=[_described(one, source) for one in plan.adapters],
        linears=rows,
        round_tripped=len(plan.target.plan.linears) if plan.onto == "dequantized" else 0,
        replaced=sorted(name for one in plan.adapters for name in one.whole),
        data=plan.data.model_dump(mode="json") if plan.data else None,
    )
    if settings.measure:
        from llmcompress.finetune.measure import measure_merge

        measure_merge(plan, folder, workspace.folder / "other", report.merge, seed, progress)
    report.save(folder)
    give_name(folder, out)
    workspace.discard()
    return report


def write_merged(
    plan: Plan, folder: Path, onto: str, progress: Progress, *, without_updates: bool = False
) -> tuple[list[Streamed], dict[str, str]]:
    """Write the checkpoint merged onto these weights; returns its tensors and the digests of its files.

    without_updates: only the weights that would be merged onto.
    """
    source, target = plan.target.source, plan.target
    used = Plan(target, [], onto, plan.trained, None) if without_updates else plan
    changed = {linear.tensor: linear for linear in used.updated(onto).values()}
    whole = {} if without_updates else {
        target.parameters[name]: (one, tensor) for one in plan.adapters for name, tensor in one.whole.items()
    }  # fmt: skip
    codes = tuple(f"{linear.row.stem}." for linear in target.linears.values() if linear.row is not None)
    tensors: list[Streamed] = []
    with progress.step("merging", len(changed)) as bar:
        for name, stored in source.stored.items():
            if name in whole:
                adapter, tensor = whole[name]
                make = partial(_loaded, adapter, tensor, stored.dtype)
                tensors.append(_Computed(name, stored.dtype, stored.shape, make))
            elif name not in changed and not name.startswith(codes or ("\0",)):
                tensors.append(stored)
        for tensor_name, linear in changed.items():
            rows, columns = linear.shape
            shape = (columns, rows) if linear.transposed else (rows, columns)
            dtype = dtype_name(target.dtype(linear))
            tensors.append(_Computed(tensor_name, dtype, shape, partial(_made, used, linear, onto, bar)))
        folder.mkdir(parents=True, exist_ok=True)
        digests = write_shards(folder, tensors)
    for path in side_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tensors, digests


def _made(plan: Plan, linear: Linear, onto: str, bar: Any) -> torch.Tensor:
    value = plan.weight(linear, onto)
    bar.advance(1, linear.name)
    return value.t().contiguous() if linear.transposed else value


def _loaded(adapter: Adapter, tensor: str, dtype: str) -> torch.Tensor:
    return adapter.stored[tensor].load().to(torch_dtype(dtype))


def _check_linears(plan: Plan, folder: Path, progress: Progress) -> list[MergedLinear]:
    """Every updated linear read back, its outputs held against base plus adapter."""
    made = Checkpoint.open(folder)
    names = [name for name in plan.target.linears if any(name in adapter.parts for adapter in plan.adapters)]
    rows = []
    with progress.step("checking merged linears", len(names)) as bar:
        for name in names:
            linear = plan.target.linears[name]
            merged = made.tensor(linear.tensor)
            merged_OI = merged.t() if linear.transposed else merged
            base_OI = plan.target.dense(linear, plan.onto == "dequantized")
            updates = [adapter.update(name) for adapter in plan.adapters if name in adapter.parts]
            change_OI = merged_weight(base_OI, updates) - base_OI.double()
            size = float(torch.linalg.norm(base_OI.double())) or 1.0
            rows.append(
                MergedLinear(
                    name=name,
                    rank=sum(update.rank for update in updates),
                    relative_update=float(torch.linalg.norm(change_OI)) / size,
                    excess=probe_excess(merged_OI, base_OI, updates, PROBE_SEED),
                )
            )
            bar.advance(1, name)
    wrong = [row for row in rows if not row.excess <= 1]
    if wrong:
        raise LLMCompressError(
            f"{len(wrong)} of {len(rows)} merged linears are not base plus adapter ({wrong[0].name} errs "
            f"{wrong[0].excess:.3g} times as much as rounding can)",
            "an update too large for the dtype of the file, or a fault of the disk or its memory; run again",
        )
    return rows


def _linear_check(rows: Sequence[MergedLinear]) -> Check:
    worst = max((row.excess for row in rows), default=0.0)
    detail = (
        f"outputs of all {len(rows)} merged linears, reopened, equal base plus adapter: the largest difference is "
        f"{worst:.2g} of what rounding to the dtype of the file allows"
    )
    return Check(name="merged linears", passed=worst <= 1, detail=detail)


def _described(adapter: Adapter, source: Checkpoint) -> MergedAdapter:
    trained = trained_on(adapter.folder)
    return MergedAdapter(
        path=str(adapter.folder),
        weight=adapter.weight,
        kind=adapter.kind,
        dora=adapter.dora,
        sha256=file_digests(adapter.folder, [WEIGHTS])[WEIGHTS],
        base_is_this=trained.base_identity == source.identity() if trained else None,
    )


def _data_of(adapters: Sequence[Adapter]) -> DataSettings | None:
    """The training data of the first adapter of ours, if its file is still there."""
    for adapter in adapters:
        if trained_on(adapter.folder) is None:
            continue
        for stage in RunReport.load(adapter.folder).recipe.get("stages", []):
            if "finetune" in stage:
                data = DataSettings.model_validate(stage["finetune"]["data"])
                there = all(Path(one).exists() for one in (data.path, data.heldout) if one and is_file(one))
                return data if there else None
    return None


def adapter_digest(path: str) -> str:
    """sha256 over an adapter's config and weights, for the key of a stage.

    Raises: LLMCompressError where no adapter lies.
    """
    folder = Adapter.open(path).folder
    return json.dumps(file_digests(folder, [CONFIG, WEIGHTS]), sort_keys=True)
