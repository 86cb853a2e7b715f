"""`effort: max`: when every layer is solved, codes and scales of all of them are tuned together, end to end.

    workspace: layer-*.gptq ──unpack──> student (codes and scales trainable) ────┐
    source ──────────────────────────> teacher                                  ─┴─> tune ──> snapped ──> judged
                                                                                        tuned-*.gptq <──pack── if better

Every layer was solved for its own output; nobody asked what the errors of all layers do together. A linear is
Q = nearest(units + m) * (scale * (1 + f)), and the moves m of all codes and the factors f of all groups are trained at
once, in all linears, by Adam on

    KL(original || quantized) of the next-token distribution, over the calibration tokens

The gradient goes through `nearest` as if it were not there (straight-through). A code begins in the middle of its cell,
so it changes only when half a step of gradients agree on it:

    ──┼────────•────────┼──      • units   m: steps of at most a hundredth or so   ┼ where the code changes
              └─ m ─>

Factors come from the end-to-end phase of EfficientQAT (Chen et al. 2024, section 3.3), moves of codes from AutoRound
(Cheng et al. 2023, section 3), which trains them layer by layer. What is fitted of the text that is not in other text
shows on held-out rows, where the best step is kept. What the file can hold is a snapped scale, so it is the snapped
model that is judged there at the end: it replaces what was solved only where it is the closer one. The solved layers
stay until the tuned ones are complete, and a run that is killed in between tunes again from the same start. Both models
are in memory at once: this is for models that fit.

Shapes: O out_features, I in_features, G groups, W width of a group, N rows, S tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.grid import Scales
from llmcompress.compress.solvers.codes import kernel_inputs
from llmcompress.compress.solvers.kernels_torch import nearest
from llmcompress.compress.solvers.refine import rescaled
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.data.calibration import CalibrationSet
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import Format
from llmcompress.formats.roundtrip import unpack_codes
from llmcompress.memory import large_blocks_kept
from llmcompress.models import meta as skeleton
from llmcompress.models.blocks import is_transposed
from llmcompress.models.experts import sliced
from llmcompress.report import LinearRow, Tuning
from llmcompress.seed import derive

HELD_OUT_SHARE = 16
"""One in so many rows of text is kept from tuning, to judge it by."""
TOKENS_PER_STEP = 2048
NOTE = "codes and scales tuned end to end afterwards; the errors here are those before"
SCALE_RATE = 3e-3
"""Of the factors, relative to a scale: a step moves a scale by at most about a third of a percent."""
CODE_RATE = 1.5e-2
"""Of the moves, relative to the distance between two values of the grid: a code needs some forty steps to change."""
WARM_UP_STEPS = 5
CHECK_EVERY = 10
"""Steps between two looks at the held-out rows."""


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
    stored = workspace.packed(range(len(rows)), formats[0].name)
    solved = {row.name: unpack_codes(stored, row, formats[0]) for of_layer in rows for row in of_layer}
    teacher, student = _dense(source), _dense(source)
    linears = {name: _replaced(student, name, weight) for name, weight in solved.items()}
    rows_per_step = max(1, TOKENS_PER_STEP // tokens_NS.shape[1])
    with progress.step("tuning codes and scales end to end", num_steps) as bar:
        tuned = tune(
            teacher, student, linears, tokens_NS, mask_NS, num_held_out, num_steps, rows_per_step,
            derive(seed, "tuning"), lambda loss: bar.advance(1, f"KL {loss:.4f}"),
        )  # fmt: skip
    after = {
        name: rescaled(replace(weight, codes_OI=tuned.best[name][0]), tuned.best[name][1], scale_dtype)
        for name, weight in solved.items()
    }
    with torch.no_grad():
        for name, linear in linears.items():
            linear.start(after[name])
    held = slice(-num_held_out, None)
    snapped = mean_divergence(teacher, student, tokens_NS[held], mask_NS[held], rows_per_step)
    kept = snapped < tuned.before
    if kept:
        _pack(workspace, formats, rows, after, scale_dtype)
    tuning = Tuning(
        num_steps=num_steps,
        num_scales=sum(weight.scale_OG.numel() for weight in solved.values()),
        num_codes=sum(weight.codes_OI.numel() for weight in solved.values()),
        num_codes_changed=sum(int((solved[name].codes_OI != after[name].codes_OI).sum()) for name in solved),
        num_held_out_tokens=int(mask_NS[held].sum()),
        held_out_kl_before=tuned.before,
        held_out_kl_after=snapped,
        kept=kept,
    )
    workspace.finish_tuning(tuning)
    return tuning


def _dense(source: Checkpoint) -> nn.Module:
    """The whole original model in float32, nothing in it trainable."""
    model = skeleton.build(source)
    source = sliced(source, model)
    names = skeleton.tensor_names(model, source)
    for name, tensor in names.items():
        skeleton.set_parameter(model, name, source.tensor(tensor).to(torch.float32))
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    skeleton.tie(model, every - names.keys())
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


def mean_divergence(
    teacher: Any, student: Any, tokens_NS: torch.Tensor, mask_NS: torch.Tensor, rows_at_once: int
) -> float:
    """Mean KL(teacher || student) over the real tokens of many rows, a few at a time."""
    total = 0.0
    with torch.no_grad():
        for tokens, mask in zip(tokens_NS.split(rows_at_once), mask_NS.split(rows_at_once), strict=True):
            total += float(divergence(teacher, student, tokens, mask)) * int(mask.sum())
    return total / max(1, int(mask_NS.sum()))


def _pack(
    workspace: Workspace, formats: Sequence[Format], rows: Sequence[Sequence[LinearRow]],
    weights: dict[str, QuantizedWeight], dtype: torch.dtype,
) -> None:  # fmt: skip
    for layer, of_layer in enumerate(rows):
        packed = {
            format.name: {
                f"{row.tensor_prefix}.{suffix}": tensor
                for row in of_layer
                for suffix, tensor in format.pack(weights[row.name], dtype).items()
            }
            for format in formats
        }
        now = [
            row.model_copy(update={"digest": weights[row.name].digest(), "notes": [*row.notes, NOTE]})
            for row in of_layer
        ]
        workspace.finish_layer(layer, packed, now, tuned=True)


class TunedLinear(nn.Module):
    """A linear whose codes and scales are trainable: `move_OGW` in steps of the grid, and `factor_OG` + 1."""

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.start(weight)

    def start(self, weight: QuantizedWeight) -> None:
        """Begin at `weight`, with nothing moved."""
        rows, groups = weight.scale_OG.shape
        self.scale_OG, self.top = weight.scale_OG.clone(), weight.grid.num_codes - 1
        self.units_OGW = weight.units().reshape(rows, groups, -1)
        self.move_OGW = nn.Parameter(torch.zeros_like(self.units_OGW))
        self.factor_OG = nn.Parameter(torch.zeros_like(self.scale_OG))
        one = Scales(torch.ones_like(self.scale_OG), weight.zero_point_OG)
        one_OG, zero_OG, self.table = kernel_inputs(one, weight.grid, self.scale_OG)
        self.one_OG1, self.zero_OG1 = one_OG[..., None], zero_OG[..., None]
        self.step = float(self.table[-1] - self.table[0]) / self.top if self.table.numel() else 1.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        wanted_OGW = self._wanted()
        _, units_OGW = self._nearest(wanted_OGW.detach())
        through_OGW = units_OGW + (wanted_OGW - wanted_OGW.detach())
        return nn.functional.linear(inputs, (through_OGW * self._scales()[..., None]).flatten(1), self.bias)

    @torch.no_grad()
    def tuned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, uint8 [O, I], and scales, [O, G], as tuned so far."""
        return self._nearest(self._wanted())[0].flatten(1), self._scales()

    def _wanted(self) -> torch.Tensor:
        """The codes' values if any were possible; beyond the ends of the grid at most half a step."""
        ends = (self.table[0], self.table[-1]) if self.table.numel() else (-self.zero_OG1, self.top - self.zero_OG1)
        return torch.clamp(self.units_OGW + self.move_OGW * self.step, ends[0] - self.step / 2, ends[1] + self.step / 2)

    def _nearest(self, wanted_OGW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nearest(wanted_OGW, self.one_OG1, self.zero_OG1, self.table, self.top)

    def _scales(self) -> torch.Tensor:
        return self.scale_OG * (1 + self.factor_OG)


@dataclass(frozen=True, slots=True)
class Tuned:
    """Mean KL per held-out token, in nats, before and at the best step; and codes and scales there, by linear."""

    before: float
    after: float
    best: dict[str, tuple[torch.Tensor, torch.Tensor]]


def divergence(teacher: Any, student: Any, tokens_NS: torch.Tensor, mask_NS: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) over the real tokens of some rows; a scalar with the student's gradient."""
    with torch.no_grad():
        teacher_NSV = teacher(input_ids=tokens_NS, attention_mask=mask_NS.long()).logits.float().log_softmax(-1)
    student_NSV = student(input_ids=tokens_NS, attention_mask=mask_NS.long()).logits.float().log_softmax(-1)
    kl_NS = (teacher_NSV.exp() * (teacher_NSV - student_NSV)).sum(-1)
    total: torch.Tensor = (kl_NS * mask_NS).sum() / mask_NS.sum().clamp(min=1)
    return total


def tune(
    teacher: Any, student: Any, linears: Mapping[str, TunedLinear], tokens_NS: torch.Tensor, mask_NS: torch.Tensor,
    num_held_out: int, num_steps: int, rows_per_step: int, seed: int, on_step: Callable[[float], None],
) -> Tuned:  # fmt: skip
    """Train codes and scales of `linears`, which `student` contains; the last `num_held_out` rows judge.

    The linears are left as they are at the end; the best step is in what is returned. on_step: called with each loss.
    """
    count = len(tokens_NS) - num_held_out
    held = slice(count, None)
    factors = {"params": [linear.factor_OG for linear in linears.values()], "lr": SCALE_RATE}
    moves = {"params": [linear.move_OGW for linear in linears.values()], "lr": CODE_RATE}
    optimizer = torch.optim.Adam([factors, moves], betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps)),
    )
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []

    def judged() -> float:
        return mean_divergence(teacher, student, tokens_NS[held], mask_NS[held], rows_per_step)

    before = after = judged()
    best = {name: linear.tuned() for name, linear in linears.items()}
    for step in range(1, num_steps + 1):
        if len(drawn) < rows_per_step:
            drawn = torch.randperm(count, generator=generator).tolist()
        rows, drawn = drawn[:rows_per_step], drawn[rows_per_step:]
        loss = divergence(teacher, student, tokens_NS[rows], mask_NS[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(float(loss.detach()))
        if step % CHECK_EVERY == 0 or step == num_steps:
            now = judged()
            if now < after:
                after, best = now, {name: linear.tuned() for name, linear in linears.items()}
    return Tuned(before, after, best)
