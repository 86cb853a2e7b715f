"""Scales tuned end to end: codes stay, and the whole model is moved closer to the original's predictions.

Every layer was solved for its own output; nobody asked what the errors of all layers do together. With the codes fixed
a linear is Q = units * (scale * (1 + f)), and the factors f of all groups of all linears are trained at once by Adam on

    KL(original || quantized) of the next-token distribution, over the calibration tokens

as in the end-to-end phase of EfficientQAT (Chen et al. 2024, section 3.3), which trains on a loss over text instead.
There are few factors (one in a group of 128 weights), so little text is needed; what they fit of it that is not in
other text shows on held-out rows, where the best step is kept, and nothing is where no step is better than the start.

Shapes: O out_features, I in_features, G groups, W width of a group, N rows, S tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompress.quantize.weight import QuantizedWeight

LEARNING_RATE = 3e-3
"""Of the factors, relative to a scale: a step moves a scale by at most about a third of a percent."""
WARM_UP_STEPS = 5
CHECK_EVERY = 10
"""Steps between two looks at the held-out rows."""


class TunedLinear(nn.Module):
    """A linear whose codes are fixed and whose scales have a trainable factor, `factor_OG` + 1."""

    units_OGW: torch.Tensor
    scale_OG: torch.Tensor

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        rows, groups = weight.scale_OG.shape
        self.register_buffer("units_OGW", weight.units().reshape(rows, groups, -1), persistent=False)
        self.register_buffer("scale_OG", weight.scale_OG.clone(), persistent=False)
        self.factor_OG = nn.Parameter(torch.zeros_like(weight.scale_OG))
        self.bias = bias

    def scales(self) -> torch.Tensor:
        """The scales as tuned so far, [O, G]."""
        return self.scale_OG * (1 + self.factor_OG)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        weight_OI = (self.units_OGW * self.scales()[..., None]).flatten(1)
        return nn.functional.linear(inputs, weight_OI, self.bias)


@dataclass(frozen=True, slots=True)
class Tuned:
    """Mean KL per held-out token, in nats, before and at the best step; and the scales there, by linear."""

    before: float
    after: float
    scales: dict[str, torch.Tensor]


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
    """Train the factors of `linears`, which `student` contains; the last `num_held_out` rows judge.

    The factors are left as they are at the end; the best ones are in what is returned. `on_step` hears the loss.
    """
    count = len(tokens_NS) - num_held_out
    held = slice(count, None)
    optimizer = torch.optim.Adam([one.factor_OG for one in linears.values()], lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []

    def judged() -> float:
        parts = zip(tokens_NS[held].split(rows_per_step), mask_NS[held].split(rows_per_step), strict=True)
        with torch.no_grad():
            sums = [(float(divergence(teacher, student, t, m)), int(m.sum())) for t, m in parts]
        return sum(kl * tokens for kl, tokens in sums) / max(1, sum(tokens for _, tokens in sums))

    before = after = judged()
    best = {name: one.scales().detach().clone() for name, one in linears.items()}
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
                after, best = now, {name: one.scales().detach().clone() for name, one in linears.items()}
    return Tuned(before, after, best)


def _rate(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
