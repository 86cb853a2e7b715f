"""`effort: max`: when every layer is solved, codes and scales of all of them are tuned together, in the same files.

    workspace: layer-*.gptq ──unpack──> student (codes and scales trainable) ────┐
    source ──────────────────────────> teacher                                  ─┴─> tuning.tune ──> snapped ──> judged
                                                                                        tuned-*.gptq <──pack── if better

What the file can hold is a snapped scale, so it is the snapped model that is judged on held-out rows: it replaces what
was solved only where it is the closer one. The solved layers stay until the tuned ones are complete, and a run that is
killed in between tunes again from the same start. Both models are in memory at once: this is for models that fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.roundtrip import unpack_row
from llmcompress.compress.solvers.refine import rescaled
from llmcompress.compress.tuning import TunedLinear, divergence, tune
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.data.calibration import CalibrationSet
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import Format
from llmcompress.memory import large_blocks_kept
from llmcompress.models import meta as skeleton
from llmcompress.models.blocks import is_transposed
from llmcompress.report import LinearRow, Tuning
from llmcompress.seed import derive

HELD_OUT_SHARE = 16
TOKENS_PER_STEP = 2048
NOTE = "codes and scales tuned end to end afterwards; the errors here are those before"


@large_blocks_kept()
def tuned_layers(
    source: Checkpoint, workspace: Workspace, formats: Sequence[Format], rows: Sequence[Sequence[LinearRow]],
    calibration: CalibrationSet, scale_dtype: torch.dtype, num_steps: int, seed: int, progress: Progress,
) -> Tuning:  # fmt: skip
    """Tune the solved layers in `workspace`, whose rows are `rows` by layer, and leave the better ones there.

    Raises: LLMCompressError for fewer than sixteen rows of text.
    """
    tokens_NS, mask_NS = calibration.tokens_NS, calibration.mask_NS
    num_held_out = len(tokens_NS) // HELD_OUT_SHARE
    if num_held_out == 0:
        raise LLMCompressError(
            f"effort max: needs {HELD_OUT_SHARE} rows of calibration text to hold one out, not {len(tokens_NS)}",
            f"pass --num-samples {HELD_OUT_SHARE} or more",
        )
    solved = _solved(workspace, rows, formats[0])
    teacher, student = _dense(source), _dense(source)
    linears = {name: _replaced(student, name, weight) for name, weight in solved.items()}
    rows_per_step = max(1, TOKENS_PER_STEP // tokens_NS.shape[1])
    with progress.step("tuning codes and scales end to end", num_steps) as bar:
        found = tune(
            teacher, student, linears, tokens_NS, mask_NS, num_held_out, num_steps, rows_per_step,
            derive(seed, "tuning"), lambda loss: bar.advance(1, f"KL {loss:.4f}"),
        )  # fmt: skip
    after = {
        name: rescaled(replace(weight, codes_OI=found.best[name][0]), found.best[name][1], scale_dtype)
        for name, weight in solved.items()
    }
    held = slice(-num_held_out, None)
    snapped = _judged(teacher, student, linears, after, tokens_NS[held], mask_NS[held], rows_per_step)
    kept = snapped < found.before
    if kept:
        _pack(workspace, formats, rows, after, scale_dtype)
    tuning = Tuning(
        num_steps=num_steps,
        num_scales=sum(weight.scale_OG.numel() for weight in solved.values()),
        num_codes=sum(weight.codes_OI.numel() for weight in solved.values()),
        num_codes_changed=sum(int((solved[name].codes_OI != after[name].codes_OI).sum()) for name in solved),
        num_held_out_tokens=int(mask_NS[held].sum()),
        held_out_kl_before=found.before,
        held_out_kl_after=snapped,
        kept=kept,
    )
    workspace.finish_tuning(tuning)
    return tuning


def _solved(workspace: Workspace, rows: Sequence[Sequence[LinearRow]], format: Format) -> dict[str, QuantizedWeight]:
    stored = {tensor.name: tensor for tensor in workspace.packed(range(len(rows)), format.name)}
    scratch = Checkpoint(str(workspace.folder), workspace.folder, None, None, {}, stored)
    return {row.name: unpack_row(scratch, row, format) for of_layer in rows for row in of_layer}


def _dense(source: Checkpoint) -> nn.Module:
    """The whole original model in float32, nothing in it trainable."""
    model = skeleton.build(source)
    names = skeleton.tensor_names(model, source)
    for name, tensor in names.items():
        skeleton.set_parameter(model, name, source.tensor(tensor).to(torch.float32))
    model.tie_weights()  # type: ignore[operator]
    return model.requires_grad_(False)


def _replaced(model: nn.Module, name: str, weight: QuantizedWeight) -> TunedLinear:
    """Put a tunable linear in the place of the one called `name`."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    linear = TunedLinear(weight, old._parameters.get("bias"))
    if is_transposed(old):  # GPT-2's Conv1D is asked for its width
        linear.nf = weight.scale_OG.shape[0]  # type: ignore[assignment]
    setattr(model.get_submodule(parent), leaf, linear)
    return linear


def _judged(
    teacher: nn.Module, student: nn.Module, linears: dict[str, TunedLinear], weights: dict[str, QuantizedWeight],
    tokens_NS: torch.Tensor, mask_NS: torch.Tensor, rows_at_once: int,
) -> float:  # fmt: skip
    """Mean KL over the real tokens with the codes and scales that `weights` have."""
    total, count = 0.0, int(mask_NS.sum())
    with torch.no_grad():
        for name, linear in linears.items():
            linear.start(weights[name])
        for tokens, mask in zip(tokens_NS.split(rows_at_once), mask_NS.split(rows_at_once), strict=True):
            total += float(divergence(teacher, student, tokens, mask)) * int(mask.sum())
    return total / max(1, count)


def _pack(
    workspace: Workspace, formats: Sequence[Format], rows: Sequence[Sequence[LinearRow]],
    weights: dict[str, QuantizedWeight], dtype: torch.dtype,
) -> None:  # fmt: skip
    for layer, of_layer in enumerate(rows):
        packed = {
            format.name: {
                f"{row.stem}.{suffix}": tensor
                for row in of_layer
                for suffix, tensor in format.pack(weights[row.name], dtype).items()
            }
            for format in formats
        }
        now = [_noted(row, weights[row.name]) for row in of_layer]
        workspace.finish_layer(layer, packed, now, tuned=True)


def _noted(row: LinearRow, weight: QuantizedWeight) -> LinearRow:
    return row.model_copy(update={"digest": weight.digest(), "notes": [*row.notes, NOTE]})
