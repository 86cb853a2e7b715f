"""The quantize stage: a checkpoint in, a smaller one out, one decoder layer in memory at a time.

    plan ─> calibration ─> for each layer: fill, stream, solve, pack, keep ─> assemble ─> reopen and compare ─> rename
                           (read ahead)                    (written behind)

A finished layer is kept in the workspace; a run that was killed replays the text through the layers already done (a
forward pass through the very weights it would have gone on with) and continues at the first that is not, which is why
it ends in the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import torch_dtype
from llmcompress.compress.assemble import assemble, describe_source
from llmcompress.compress.block_solver import LayerSolver
from llmcompress.compress.effort import tuned_layers
from llmcompress.compress.footprint import Footprint, footprint
from llmcompress.compress.methods.base import METHODS
from llmcompress.compress.prefetch import ReadAhead, WriteBehind
from llmcompress.compress.roundtrip import unpack_row
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.compress.targets import Plan, Target, plan
from llmcompress.compress.timing import Ledger
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.data.calibration import CalibrationSet, CalibrationSpec, load_calibration
from llmcompress.distributed import ProcessLostError, World
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import FORMATS, Format, Layout
from llmcompress.memory import give_back, large_blocks_mapped
from llmcompress.models import device as devices
from llmcompress.models import meta as skeleton
from llmcompress.models.activations import ActivationFile
from llmcompress.models.blocks import DecoderLayers, decoder_layers, hidden_size, put_weight_OI
from llmcompress.models.shared_inputs import shared_inputs
from llmcompress.models.stream import Calls, Original, capture, plain, recomputed, share_arguments, staged
from llmcompress.report import LinearRow, RunReport, Tuning, Work


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
    compute: torch.dtype
    world: World
    ledger: Ledger
    footprint: Footprint | None
    reader: ReadAhead
    writer: WriteBehind


@large_blocks_mapped()
def quantize(
    source: Checkpoint, out: Path, settings: QuantizeSettings, *, seed: int, key: str, report: RunReport,
    progress: Progress, calibration: CalibrationSet | None = None,
) -> RunReport:  # fmt: skip
    """Quantize `source` into `out` (one folder per layout below it when several are asked for).

    `key` names this very work: a workspace left by a killed run with the same key is continued. The report is filled
    and saved inside the output before the output gets its name. calibration: rows to use instead of the named set.

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
    if method.needs_hessian and calibration is None:
        calibration = _calibration(source, settings, seed, model)
    if calibration is None:
        raise_all(_without_text(settings))
    source.require_finite()
    report.source = report.source or describe_source(source, model)
    report.calibration = calibration.provenance if calibration else None
    world = World.join()
    workspace = _workspace(out, key, world)
    device = devices.best()
    job = _Job(
        source, model, layers, names, plan_, formats, settings, workspace, device, dtype,
        torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else torch.float32,
        world, Ledger(), _footprint(calibration, settings, model, plan_, world),
        _reader(source, layers, names, workspace), WriteBehind(),
    )  # fmt: skip
    try:
        _solve_all(job, calibration, progress)
        if world.first:
            report.tuning = _tuned(job, calibration, seed, progress)
            rows = [row for index in range(len(layers.layers)) for row in workspace.finished_rows(index) or ()]
            report.linears = [*rows, *plan_.skipped]
            report.work = _work(job, rows)
            assemble(source, out, workspace, formats, layout, plan_, report, progress)
        world.wait()
    except ProcessLostError:
        raise
    except LLMCompressError:  # trying again would meet the same error; only an interruption is worth resuming
        if world.first:
            workspace.discard()
        raise
    finally:
        job.reader.close()
        job.writer.close()
    return report


def _tuned(job: _Job, calibration: CalibrationSet | None, seed: int, progress: Progress) -> Tuning | None:
    """What effort max does after the last layer, unless an earlier run of the same work did it."""
    if job.settings.effort != "max" or calibration is None:
        return None
    return job.workspace.tuning or tuned_layers(
        job.source, job.workspace, job.formats,
        [job.workspace.finished_rows(index) or [] for index in range(len(job.layers.layers))],
        calibration, job.dtype, job.settings.tune_steps, seed, progress,
    )  # fmt: skip


def _without_text(settings: QuantizeSettings) -> list[LLMCompressError]:
    """What was asked for that a method without calibration text cannot do."""
    asked = {"effort max": settings.effort == "max", "asymmetric_calibration": settings.asymmetric_calibration}
    return [
        LLMCompressError(f"{name}: method {settings.method} reads no calibration text to judge by", "use method gptq")
        for name, wanted in asked.items()
        if wanted
    ]


def _workspace(out: Path, key: str, world: World) -> Workspace:
    """The scratch folder, opened by the first process for all."""
    if world.first:
        Workspace.open(out, key)
    world.wait()
    return Workspace.of(out)


def _reader(source: Checkpoint, layers: DecoderLayers, names: dict[str, str], workspace: Workspace) -> ReadAhead:
    """Reads the tensors of the layers that are still to do, in the order in which they are asked for, a layer ahead."""
    start = next((i for i in range(len(layers.layers)) if workspace.finished_rows(i) is None), len(layers.layers))
    expected: list[str] = []
    most = 0
    for index in range(start, len(layers.layers)):
        found = [names.get(f"{layers.name(index)}.{local}") for local, _ in layers.layers[index].named_parameters()]
        own = [name for name in found if name]
        most = max(most, sum(source.stored[name].num_bytes for name in own))
        expected += own
    return ReadAhead(source, expected, most)


def _footprint(
    calibration: CalibrationSet | None, settings: QuantizeSettings, model: nn.Module, plan_: Plan, world: World
) -> Footprint | None:
    if calibration is None:
        return None
    rows, length = calibration.tokens_NS.shape
    mine = world.share(rows)
    if rows < world.size:
        raise LLMCompressError(f"num_samples {rows}: fewer rows of text than the {world.size} processes")
    return footprint(
        (mine.stop - mine.start) * length,
        max(settings.batch_tokens, length),
        hidden_size(model),
        max(target.in_features for target in plan_.targets),
        settings.activation_memory_mb << 20,
        settings.aims(),
    )


def _work(job: _Job, rows: Sequence[LinearRow]) -> Work:
    taken = job.footprint or Footprint("staged", "memory", None, 0, 0)
    work = job.ledger.work(taken.form, taken.activations, taken.reason, job.world.size)
    tried = [row for row in rows if row.held_out_error is not None and row.plain_held_out_error is not None]
    work.num_worse = sum((row.held_out_error or 0) > (row.plain_held_out_error or 0) for row in tried)
    return work


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
    from llmcompress.checkpoint.source import load_tokenizer

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
    if job.footprint is not None and job.footprint.reason:
        progress.message(f"{job.footprint.form}, activations in {job.footprint.activations}: {job.footprint.reason}")
    with torch.no_grad(), progress.step("quantizing decoder layers", total) as bar:
        with job.ledger.of("forward"):
            calls, masks = _captured(job, calibration) if calibration is not None and start < total else ([], [])
        beside = [Calls(call.hidden_BSH, call.arguments) for call in calls] if job.settings.aims() else []
        for index in range(total):
            done = finished[index] if index < start else None
            original = _original(job, index, beside) if beside else None
            if done is None:
                done = _solve_layer(job, index, calls, masks, original)
            elif calls:
                _replay(job, index, calls, done)
                if original:
                    plain(original.layer, index, original.calls)
            rows += done
            give_back()
            bar.advance(1, f"layer {index}")
        with job.ledger.of("writing"):
            job.writer.wait()
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
            value = job.source.tensor(job.names[name]).to(device, job.compute)
            skeleton.set_parameter(model, name, value)
    for module in model.modules():
        for local, buffer in module._buffers.items():
            module._buffers[local] = buffer.to(device) if buffer is not None else None
    mine = job.world.share(len(calibration.tokens_NS))
    tokens_NS, mask_NS = calibration.tokens_NS[mine], calibration.mask_NS[mine]
    rows = max(1, job.settings.batch_tokens // tokens_NS.shape[1])
    layers = model.get_submodule(job.layers.path)
    assert isinstance(layers, nn.ModuleList) and job.footprint is not None
    batches = list(zip(tokens_NS.split(rows), mask_NS.split(rows), strict=True))
    file = ActivationFile(job.workspace.folder) if job.footprint.activations == "disk" else None
    calls: list[Calls] = []
    for tokens, mask in batches:
        calls.append(capture(model, layers, tokens.to(device), mask.to(device)))
        if file is not None:
            calls[-1].park(file)
    share_arguments(calls)
    for name in outside:
        skeleton.set_parameter(model, name, torch.empty_like(model.get_parameter(name), device="meta"))
    return calls, [None if bool(mask.all()) else mask.to(device) for _, mask in batches]


def _original(job: _Job, index: int, calls: list[Calls]) -> Original:
    """The layer as the source has it, with the original model's batches."""
    layer = copy.deepcopy(job.layers.layers[index])
    skeleton.fill(layer, job.layers.name(index), job.names, job.source.tensor, job.device, job.compute)
    return Original(layer, calls)


def _solve_layer(
    job: _Job, index: int, calls: list[Calls], masks: Sequence[torch.Tensor | None], original: Original | None
) -> list[LinearRow]:
    layer = job.layers.layers[index]
    targets = {target.local: target for target in job.plan.of_layer(index)}
    groups = shared_inputs(layer, index, calls[0], list(targets)) if calls else []
    solver = LayerSolver(
        layer, targets, masks, METHODS.get(job.settings.method), _method_settings(job.settings),
        job.settings.on_failure, job.settings.refine_sweeps, original is not None,
        job.dtype, job.device, job.compute, lambda target: job.reader.tensor(target.tensor),
        job.ledger, job.world,
    )  # fmt: skip
    weights = [f"{local}.weight" for local in targets]
    prefix = job.layers.name(index)
    with job.ledger.of("reading"):
        skeleton.fill(layer, prefix, job.names, job.reader.tensor, job.device, job.compute, leave=weights)
    with job.ledger.of("forward"):
        if not calls:
            unreached = list(targets)
        elif job.footprint and job.footprint.form == "recomputed":
            unreached = recomputed(layer, index, calls, groups, solver, job.world.least)
        else:
            unreached = staged(layer, index, calls, groups, solver, job.world.least, original)
    for local in unreached:
        solver.without_calibration(local)
    skeleton.empty(layer)
    order = {target.name: position for position, target in enumerate(targets.values())}
    rows = sorted(solver.rows, key=lambda row: order[row.name])
    if job.world.first:
        _keep(job, index, targets, solver, rows)
    return rows


def _keep(job: _Job, index: int, targets: dict[str, Target], solver: LayerSolver, rows: list[LinearRow]) -> None:
    """Pack a solved layer and have it written while the next one is solved."""
    packed: dict[str, dict[str, torch.Tensor]] = {format.name: {} for format in job.formats}
    with job.ledger.of("packing"):
        for local in list(solver.weights):
            weight = solver.weights.pop(local)
            for format in job.formats:
                for suffix, tensor in format.pack(weight, job.dtype).items():
                    packed[format.name][f"{targets[local].stem}.{suffix}"] = tensor
    with job.ledger.of("writing"):
        job.writer.submit(lambda: job.workspace.finish_layer(index, packed, rows))


def _replay(job: _Job, index: int, calls: list[Calls], rows: Sequence[LinearRow]) -> None:
    """Move the text through a layer that an earlier run finished, through its quantized weights."""
    layer, format = job.layers.layers[index], job.formats[0]
    locals_ = {target.name: target.local for target in job.plan.of_layer(index)}
    weights = [f"{local}.weight" for local in locals_.values()]
    prefix = job.layers.name(index)
    skeleton.fill(layer, prefix, job.names, job.source.tensor, job.device, job.compute, leave=weights)
    stored = {t.name: t for t in job.workspace.packed([index], format.name)}
    scratch = Checkpoint(str(job.workspace.folder), job.workspace.folder, None, None, {}, stored)
    for row in rows:
        weight = unpack_row(scratch, row, format)
        put_weight_OI(layer.get_submodule(locals_[row.name]), weight.dequantize().to(job.device, job.compute))
    with job.ledger.of("forward"):
        plain(layer, index, calls)
    skeleton.empty(layer)
