"""The quantize stage: a checkpoint in, a smaller one out, one decoder layer in memory at a time.

    plan ─> calibration ─> for each layer: fill, stream, solve, pack, keep ─> assemble ─> reopen and compare ─> rename

A finished layer is kept in the workspace; a run that was killed replays the text through the layers already done (a
forward pass through the very weights it would have gone on with) and continues at the first that is not, which is why
it ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from llmcompress import device as devices
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.tensors import torch_dtype
from llmcompress.data.calibration import CalibrationSet, CalibrationSpec, load_calibration
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.models import skeleton
from llmcompress.models.layout import DecoderLayers, decoder_layers, put_weight_OI
from llmcompress.models.stream import Calls, capture, plain, share_arguments, staged
from llmcompress.progress import Progress
from llmcompress.quantize.assemble import assemble, describe_source
from llmcompress.quantize.format import FORMATS, Format, Layout
from llmcompress.quantize.method import METHODS
from llmcompress.quantize.roundtrip import unpack_row
from llmcompress.quantize.settings import QuantizeSettings
from llmcompress.quantize.solving import LayerSolver
from llmcompress.quantize.targets import Plan, plan
from llmcompress.quantize.workspace import Workspace
from llmcompress.report import LinearRow, RunReport


@dataclass
class _Job:
    """What one quantization needs at every layer."""

    source: Checkpoint
    model: nn.Module
    layers: DecoderLayers
    names: dict[str, str]
    plan: Plan
    formats: list[Format]
    settings: QuantizeSettings
    workspace: Workspace
    device: torch.device
    dtype: torch.dtype


def quantize(
    source: Checkpoint, out: Path, settings: QuantizeSettings, *, seed: int, key: str, report: RunReport,
    progress: Progress,
) -> RunReport:  # fmt: skip
    """Quantize `source` into `out` (one folder per layout below it when several are asked for).

    `key` names this very work: a workspace left by a killed run with the same key is continued. The report is filled
    and saved inside the output before the output gets its name.

    Raises: LLMCompressError for anything a user can mend; the output is then not there, the finished layers are kept.
    """
    formats = [FORMATS.get(name) for name in settings.formats()]
    method = METHODS.get(settings.method)
    method_settings = _method_settings(settings)
    model = skeleton.build(source)
    layers = decoder_layers(model)
    names = skeleton.tensor_names(model, source)
    plan_ = plan(model, layers, names, source, settings, formats)
    dtype = _weights_dtype(source, plan_)
    layout = Layout(
        schemes={target.name: target.scheme for target in plan_.targets},
        skipped=tuple(row.name for row in plan_.skipped),
        dtype=dtype,
        method=method.name,
        actorder=getattr(method_settings, "actorder", "none"),
        dampening_frac=getattr(method_settings, "dampening_frac", 0.01),
        version=report.environment.llmcompress,
    )
    refusals = [(format, format.refuses_layout(layout)) for format in formats]
    raise_all([LLMCompressError(f"format {format.name}: {reason}") for format, reason in refusals if reason])
    calibration = _calibration(source, settings, seed, model) if method.needs_hessian else None
    source.require_finite()
    report.source = describe_source(source, model)
    report.calibration = calibration.provenance if calibration else None
    workspace = Workspace.open(out, key)
    job = _Job(source, model, layers, names, plan_, formats, settings, workspace, devices.best(), dtype)
    try:
        report.linears = [*_solve_all(job, calibration, progress), *plan_.skipped]
        assemble(source, out, workspace, formats, layout, plan_, report, progress)
    except LLMCompressError:  # trying again would meet the same error; only an interruption is worth resuming
        workspace.discard()
        raise
    return report


def _method_settings(settings: QuantizeSettings) -> BaseModel:
    from pydantic import ValidationError

    method = METHODS.get(settings.method)
    try:
        return method.settings(**settings.method_settings)
    except ValidationError as error:
        problems = [
            LLMCompressError(
                f"method {method.name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}",
                f"its knobs: {', '.join(method.settings.model_fields) or 'none'}",
            )
            for problem in error.errors()
        ]
        raise_all(problems)
        raise


def _weights_dtype(source: Checkpoint, plan_: Plan) -> torch.dtype:
    return torch_dtype(source.dtype(plan_.targets[0].tensor))


def _calibration(source: Checkpoint, settings: QuantizeSettings, seed: int, model: nn.Module) -> CalibrationSet:
    from llmcompress.checkpoint.tokenizer import load_tokenizer

    return load_calibration(
        CalibrationSpec.choose(settings.calibration, source.name),
        load_tokenizer(source),
        num_samples=settings.num_samples,
        seq_len=settings.seq_len,
        seed=seed,
        max_positions=getattr(model.config, "max_position_embeddings", None),
    )


def _solve_all(job: _Job, calibration: CalibrationSet | None, progress: Progress) -> list[LinearRow]:
    rows: list[LinearRow] = []
    total = len(job.layers.layers)
    finished = [job.workspace.finished_rows(index) for index in range(total)]
    start = finished.index(None) if None in finished else total
    if start > 0:
        progress.message(f"resuming: {start} of {total} decoder layers are done")
    with torch.no_grad(), progress.step("quantizing decoder layers", total) as bar:
        calls, masks = _captured(job, calibration) if calibration is not None and start < total else ([], [])
        for index in range(total):
            done = finished[index] if index < start else None
            if done is None:
                done = _solve_layer(job, index, calls, masks)
            elif calls:
                _replay(job, index, calls, done)
            rows += done
            bar.advance(1, f"layer {index}")
    return rows


def _captured(job: _Job, calibration: CalibrationSet) -> tuple[list[Calls], list[torch.Tensor | None]]:
    """Every batch at the door of the first layer, and its mask (None where every token is real)."""
    model, device = job.model, job.device
    inside = f"{job.layers.path}."
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads = {name for name, module in model.named_modules() if module is head} if head is not None else set()
    outside = [n for n, _ in model.named_parameters() if not n.startswith(inside) and n.rpartition(".")[0] not in heads]
    for name in outside:
        if name in job.names:
            value = job.source.tensor(job.names[name]).to(device, torch.float32)
            skeleton.set_parameter(model, name, value)
    for module in model.modules():
        for local, buffer in module._buffers.items():
            module._buffers[local] = buffer.to(device) if buffer is not None else None
    rows = max(1, job.settings.batch_tokens // calibration.tokens_NS.shape[1])
    layers = model.get_submodule(job.layers.path)
    assert isinstance(layers, nn.ModuleList)
    batches = list(zip(calibration.tokens_NS.split(rows), calibration.mask_NS.split(rows), strict=True))
    calls = [capture(model, layers, tokens.to(device), mask.to(device)) for tokens, mask in batches]
    share_arguments(calls)
    for name in outside:
        skeleton.set_parameter(model, name, torch.empty_like(model.get_parameter(name), device="meta"))
    return calls, [None if bool(mask.all()) else mask.to(device) for _, mask in batches]


def _solve_layer(job: _Job, index: int, calls: list[Calls], masks: Sequence[torch.Tensor | None]) -> list[LinearRow]:
    layer = job.layers.layers[index]
    targets = {target.local: target for target in job.plan.of_layer(index)}
    method = METHODS.get(job.settings.method)
    solver = LayerSolver(
        layer,
        targets,
        masks,
        method,
        _method_settings(job.settings),
        job.settings.on_failure,
        job.settings.refine_sweeps,
        job.dtype,
    )
    skeleton.fill(layer, job.layers.name(index), job.names, job.source, job.device)
    if calls:
        modules = {local: layer.get_submodule(local) for local in targets}
        for local in staged(layer, index, calls, modules, solver.due):
            solver.without_calibration(local)
    else:
        for local in targets:
            solver.without_calibration(local)
    skeleton.empty(layer)
    order = {target.name: position for position, target in enumerate(targets.values())}
    rows = sorted(solver.rows, key=lambda row: order[row.name])
    packed: dict[str, dict[str, torch.Tensor]] = {format.name: {} for format in job.formats}
    for format in job.formats:
        for local, weight in solver.weights.items():
            for suffix, tensor in format.pack(weight, job.dtype).items():
                packed[format.name][f"{targets[local].stem}.{suffix}"] = tensor
    job.workspace.finish_layer(index, packed, rows)
    return rows


def _replay(job: _Job, index: int, calls: list[Calls], rows: Sequence[LinearRow]) -> None:
    """Move the text through a layer that an earlier run finished, through its quantized weights."""
    layer, format = job.layers.layers[index], job.formats[0]
    skeleton.fill(layer, job.layers.name(index), job.names, job.source, job.device)
    stored = {t.name: t for t in job.workspace.packed([index], format.name)}
    scratch = Checkpoint(str(job.workspace.folder), job.workspace.folder, None, None, {}, stored)
    locals_ = {target.name: target.local for target in job.plan.of_layer(index)}
    for row in rows:
        weight = unpack_row(scratch, row, format)
        put_weight_OI(layer.get_submodule(locals_[row.name]), weight.dequantize().to(job.device))
    plain(layer, index, calls)
    skeleton.empty(layer)
