"""The quantize stage: a checkpoint in, a smaller one out, one decoder layer in memory at a time.

    choose ─> calibration ─> layer loop (loop.py) ─> tuning ─> assemble ─> reopen and compare ─> rename

A finished layer is kept in the workspace; a run that was killed replays the text through the layers already done (a
forward pass through the very weights it would have gone on with) and continues at the first that is not, which is why
it ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import torch_dtype
from llmcompress.compress.assemble import assemble, describe_source
from llmcompress.compress.footprint import Footprint, footprint
from llmcompress.compress.loadable import loadable
from llmcompress.compress.loop import LayerLoop
from llmcompress.compress.methods.base import LinearMethod
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.compress.targets import Targets, choose, model_kept, model_linears
from llmcompress.compress.timing import Ledger
from llmcompress.compress.tuning import tuned_layers
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.data.calibration import CalibrationSet, CalibrationSpec, load_calibration
from llmcompress.distributed import ProcessLostError, World
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.formats.base import EXPERT, FORMATS, Format, Layout
from llmcompress.memory import large_blocks_mapped
from llmcompress.models import meta as skeleton
from llmcompress.models.blocks import decoder_layers, hidden_size
from llmcompress.models.config import text_config
from llmcompress.models.experts import sliced
from llmcompress.report import LinearRow, Profile, RunReport, Tuning


@large_blocks_mapped()
def quantize(
    source: Checkpoint, out: Path, settings: QuantizeSettings, *, seed: int, key: str, report: RunReport,
    progress: Progress, calibration: CalibrationSet | None = None,
) -> RunReport:  # fmt: skip
    """Quantize `source` into `out` (one folder per layout below it when several are asked for).

    `key` names this very work: a workspace left by a killed run with the same key is continued. The report is filled
    and saved inside the output before the output gets its name. calibration: rows to use instead of the named set; a
    method that needs no statistics reads none.

    Raises: LLMCompressError for anything a user can mend; the output is then not there, the finished layers are kept.
    """
    formats = [FORMATS.get(name) for name in settings.formats()]
    method, _ = settings.solver()
    model = skeleton.build(source)
    layers = decoder_layers(model)
    given, source = source, sliced(source, model)
    names = skeleton.tensor_names(model, source)
    kept = model_kept(model, layers, names, source.stored)
    chosen = choose(model_linears(model, layers, names, source.dtype), settings, formats, source.name, kept)
    chosen, layout = loadable(source, chosen, formats, lambda chosen: _layout(chosen, settings, report))
    refusals = [(format, format.refuses_layout(layout)) for format in formats]
    raise_all([LLMCompressError(f"format {format.name}: {reason}") for format, reason in refusals if reason])
    calibration = _calibration(source, settings, method, seed, model, calibration)
    given.require_finite()
    report.source = report.source or describe_source(given, model)
    report.calibration = calibration.provenance if calibration else None
    world = World.join()
    streaming = _footprint(calibration, settings, model, chosen, world)
    workspace = _workspace(out, key, world)
    ledger = Ledger()
    loop = LayerLoop(
        source, model, layers, names, chosen, formats, settings, layout.dtype, streaming, workspace, world, ledger
    )
    try:
        loop.run(calibration, progress)
        if world.first:
            report.tuning = _tuned(
                source, workspace, formats, len(layers.layers), calibration, settings, layout.dtype, seed, progress
            )
            rows = [row for of_layer in _finished(workspace, len(layers.layers)) for row in of_layer]
            report.linears = [*rows, *chosen.skipped_rows()]
            report.profile = _work(ledger, streaming, world, rows)
            assemble(source, out, workspace, formats, layout, chosen, report, progress)
        world.wait()
    except ProcessLostError:
        raise
    except LLMCompressError:  # trying again would meet the same error; only an interruption is worth resuming
        if world.first:
            workspace.discard()
        raise
    finally:
        loop.close()
    return report


def _layout(chosen: Targets, settings: QuantizeSettings, report: RunReport) -> Layout:
    """What the formats are told of the whole checkpoint."""
    method, method_settings = settings.solver()
    return Layout(
        schemes={target.name: target.scheme for target in chosen.targets},
        skipped=tuple(linear.name for linear, _ in chosen.skipped if linear.module_class or linear.tensor),
        dtype=torch_dtype(chosen.targets[0].dtype),
        method=method.name,
        knobs=method_settings.model_dump(),
        version=report.environment.llmcompress,
    )


def _calibration(
    source: Checkpoint, settings: QuantizeSettings, method: LinearMethod, seed: int, model: nn.Module,
    given: CalibrationSet | None,
) -> CalibrationSet | None:  # fmt: skip
    """The rows that statistics are taken from: those given, or the named set; None for a method that needs none.

    Raises: LLMCompressError for what such a method cannot do.
    """
    from llmcompress.checkpoint.source import load_tokenizer

    if not method.needs:
        asked = {"effort max": settings.effort == "max", "asymmetric_calibration": settings.asymmetric_calibration}
        raise_all(
            [
                LLMCompressError(
                    f"{name}: method {method.name} reads no calibration text to judge by", "use method gptq"
                )
                for name, wanted in asked.items()
                if wanted
            ]
        )
        return None
    if given is not None:
        return given
    return load_calibration(
        CalibrationSpec.choose(settings.calibration, source.name),
        load_tokenizer(source),
        num_samples=settings.num_samples,
        seq_len=settings.seq_len,
        seed=seed,
        max_positions=getattr(text_config(model.config), "max_position_embeddings", None),
    )


def _workspace(out: Path, key: str, world: World) -> Workspace:
    """The scratch folder, opened by the first process for all."""
    if world.first:
        Workspace.open(out, key)
    world.wait()
    return Workspace.of(out)


def _footprint(
    calibration: CalibrationSet | None, settings: QuantizeSettings, model: nn.Module, chosen: Targets, world: World
) -> Footprint:
    """How this process streams its share of the text; without text there is nothing to hold."""
    if calibration is None:
        return Footprint("staged", "memory", None, 0, 0)
    rows, length = calibration.tokens_NS.shape
    mine = world.share(rows)
    if rows < world.size:
        raise LLMCompressError(f"num_samples {rows}: fewer rows of text than the {world.size} processes")
    return footprint(
        (mine.stop - mine.start) * length,
        max(settings.batch_tokens, length),
        hidden_size(model),
        max(target.in_features for target in chosen.targets),
        settings.activation_memory_mb << 20,
        settings.runs_original(),
        any(EXPERT.fullmatch(target.name) for target in chosen.targets),
    )


def _finished(workspace: Workspace, num_layers: int) -> list[list[LinearRow]]:
    """The rows of every layer, in order."""
    return [workspace.finished_rows(index) or [] for index in range(num_layers)]


def _tuned(
    source: Checkpoint, workspace: Workspace, formats: Sequence[Format], num_layers: int,
    calibration: CalibrationSet | None, settings: QuantizeSettings, dtype: torch.dtype, seed: int, progress: Progress,
) -> Tuning | None:  # fmt: skip
    """What effort max does after the last layer, unless an earlier run of the same work did it."""
    if settings.effort != "max" or calibration is None:
        return None
    return workspace.tuning or tuned_layers(
        source, workspace, formats, _finished(workspace, num_layers), calibration, dtype, settings.tune_steps, seed,
        progress,
    )  # fmt: skip


def _work(ledger: Ledger, streaming: Footprint, world: World, rows: Sequence[LinearRow]) -> Profile:
    work = ledger.work(streaming.form, streaming.activations, streaming.reason, world.size)
    errors = [(row.held_out_error, row.plain_held_out_error) for row in rows]
    work.num_worse = sum(kept > plain for kept, plain in errors if kept is not None and plain is not None)
    return work
