"""Tuning end to end: the loss is the KL it says, codes and scales move on the grid, and only what is better is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.compress.methods import rtn
from llmcompress.compress.scheme import PRESETS, Scheme
from llmcompress.compress.solvers.refine import rescaled
from llmcompress.compress.tuning import TunedLinear, divergence, tune
from llmcompress.compress.weight import QuantizedWeight
from tests.grids import NF4, weights_only
from tests.unit.compress.test_gptq import SCHEMES

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, 20, (12, 9), generator=GENERATOR)
MASK = torch.ones(12, 9, dtype=torch.bool)


class Model(nn.Module):
    """An embedding and one linear onto the vocabulary: logits of a toy language model."""

    def __init__(self, embedding: torch.Tensor, head: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = embedding, head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.head(self.embedding[input_ids]))


def models(scheme: Scheme) -> tuple[Model, Model, TunedLinear, QuantizedWeight]:
    generator = torch.Generator().manual_seed(1)
    embedding, weight = torch.randn(20, 64, generator=generator), torch.randn(20, 64, generator=generator) / 4
    head = nn.Linear(64, 20, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    start = rtn.ENTRY.solve(weight, None, scheme, torch.float32, rtn.ENTRY.settings())
    tuned = TunedLinear(start, None)
    return Model(embedding, head), Model(embedding, tuned), tuned, start


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label())
def test_a_tuned_linear_starts_as_the_quantized_one(scheme: Scheme) -> None:
    weight = torch.randn(8, 192, generator=GENERATOR)
    quantized = rtn.ENTRY.solve(weight, None, scheme, torch.float32, rtn.ENTRY.settings())
    inputs, bias = torch.randn(3, 192, generator=GENERATOR), torch.randn(8, generator=GENERATOR)
    linear = TunedLinear(quantized, bias)
    torch.testing.assert_close(linear(inputs), inputs @ quantized.dequantize().T + bias)
    moved = rescaled(quantized, quantized.scale_OG * 1.01, torch.float32)
    assert torch.equal(moved.codes_OI, quantized.codes_OI) and bool((moved.scale_OG > 0).all())
    torch.testing.assert_close(moved.scale_OG, quantized.scale_OG * 1.01, rtol=2e-2, atol=0)


def test_the_divergence_is_the_float64_formula_over_real_tokens_alone() -> None:
    teacher, student, _, _ = models(weights_only(3, 32))
    mask = MASK.clone()
    mask[:, 5:] = False
    p, q = (m(TOKENS, None).logits.double().log_softmax(-1)[:, :5] for m in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert float(divergence(teacher, student, TOKENS, mask)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("scheme", [weights_only(2, 32), weights_only(2, 32, symmetric=False), PRESETS["NF4"]])
def test_tuning_lowers_the_divergence_on_rows_it_does_not_train_on(scheme: Scheme) -> None:
    teacher, student, linear, start = models(scheme)
    heard: list[float] = []
    found = tune(teacher, student, {"head": linear}, TOKENS, MASK, 3, 120, 4, 0, heard.append)
    assert found.after < found.before and len(heard) == 120
    codes, scales = found.best["head"]
    assert codes.dtype == torch.uint8 and int(codes.max()) < scheme.grid.num_codes
    assert not torch.equal(codes, start.codes_OI) and not torch.equal(scales, start.scale_OG)
    linear.start(replace(start, codes_OI=codes, scale_OG=scales))
    assert float(divergence(teacher, student, TOKENS[-3:], MASK[-3:])) == pytest.approx(found.after, rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label())
def test_a_code_is_the_nearest_to_where_it_was_moved(scheme: Scheme) -> None:
    weight = torch.randn(6, 192, generator=GENERATOR)
    start = rtn.ENTRY.solve(weight, None, scheme, torch.float32, rtn.ENTRY.settings())
    linear = TunedLinear(start, None)
    assert torch.equal(linear.tuned()[0], start.codes_OI)
    with torch.no_grad():
        linear.move_OGW.copy_(torch.rand(linear.move_OGW.shape, generator=GENERATOR) * 6 - 3)
    codes, _ = linear.tuned()
    step = 2 / 15 if scheme.grid.codebook else 1
    wanted = (start.units() + linear.move_OGW.detach().flatten(1) * step).double()
    if scheme.grid.codebook:
        values = torch.tensor(NF4).double().expand(6, 192, 16)
    else:
        assert start.zero_point_OG is not None
        zero = start.zero_point_OG.double().repeat_interleave(scheme.grid.group_width(192), 1)
        values = torch.arange(scheme.grid.num_codes).double() - zero[..., None]
    assert torch.equal(codes.long(), (values - wanted[..., None]).abs().argmin(-1))


def test_the_same_seed_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        teacher, student, linear, _ = models(weights_only(3, 32))
        results.append(tune(teacher, student, {"head": linear}, TOKENS, MASK, 3, 60, 4, 7, lambda _: None).best["head"])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
