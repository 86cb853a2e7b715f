"""Codes and scales tuned end to end: the whole model is moved closer to the original's predictions.

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
shows on held-out rows, where the best step is kept, and nothing is where no step is better than the start.

Shapes: O out_features, I in_features, G groups, W width of a group, N rows, S tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompress.compress.grid import Scales
from llmcompress.compress.solvers.codes import kernel_inputs
from llmcompress.compress.solvers.kernels_torch import nearest
from llmcompress.compress.weight import QuantizedWeight

SCALE_RATE = 3e-3
"""Of the factors, relative to a scale: a step moves a scale by at most about a third of a percent."""
CODE_RATE = 1.5e-2
"""Of the moves, relative to the distance between two values of the grid: a code needs some forty steps to change."""
WARM_UP_STEPS = 5
CHECK_EVERY = 10
"""Steps between two looks at the held-out rows."""


class TunedLinear(nn.Module):
    """A linear whose codes and scales are trainable: `move_OGW` in steps of the grid, and `factor_OG` + 1."""

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.start(weight)

    def start(self, weight: QuantizedWeight) -> None:
        """Begin at `weight`, with nothing moved."""
        rows, groups = weight.scale_OG.shape
        self.scale_OG, self.top = weight.scale_OG.clone(), weight.scheme.num_codes - 1
        self.units_OGW = weight.units().reshape(rows, groups, -1)
        self.move_OGW = nn.Parameter(torch.zeros_like(self.units_OGW))
        self.factor_OG = nn.Parameter(torch.zeros_like(self.scale_OG))
        one = Scales(torch.ones_like(self.scale_OG), weight.zero_point_OG)
        one_OG, zero_OG, self.table = kernel_inputs(one, weight.scheme, self.scale_OG)
        self.one_OG1, self.zero_OG1 = one_OG[..., None], zero_OG[..., None]
        self.step = 2 / self.top if weight.codebook is not None else 1.0

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
        expected_NSV = teacher(input_ids=tokens_NS, attention_mask=mask_NS.long()).logits.float().log_softmax(-1)
    found_NSV = student(input_ids=tokens_NS, attention_mask=mask_NS.long()).logits.float().log_softmax(-1)
    kl_NS = (expected_NSV.exp() * (expected_NSV - found_NSV)).sum(-1)
    total: torch.Tensor = (kl_NS * mask_NS).sum() / mask_NS.sum().clamp(min=1)
    return total


def tune(
    teacher: Any, student: Any, linears: Mapping[str, TunedLinear], tokens_NS: torch.Tensor, mask_NS: torch.Tensor,
    num_held_out: int, num_steps: int, rows_per_step: int, seed: int, on_step: Callable[[float], None],
) -> Tuned:  # fmt: skip
    """Train codes and scales of `linears`, which `student` contains; the last `num_held_out` rows judge.

    The linears are left as they are at the end; the best step is in what is returned. `on_step` hears the loss.
    """
    count = len(tokens_NS) - num_held_out
    held = slice(count, None)
    factors = {"params": [one.factor_OG for one in linears.values()], "lr": SCALE_RATE}
    moves = {"params": [one.move_OGW for one in linears.values()], "lr": CODE_RATE}
    optimizer = torch.optim.Adam([factors, moves], betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []

    def judged() -> float:
        parts = zip(tokens_NS[held].split(rows_per_step), mask_NS[held].split(rows_per_step), strict=True)
        with torch.no_grad():
            sums = [(float(divergence(teacher, student, t, m)), int(m.sum())) for t, m in parts]
        return sum(kl * tokens for kl, tokens in sums) / max(1, sum(tokens for _, tokens in sums))

    before = after = judged()
    best = {name: one.tuned() for name, one in linears.items()}
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
                after, best = now, {name: one.tuned() for name, one in linears.items()}
    return Tuned(before, after, best)


def _rate(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
