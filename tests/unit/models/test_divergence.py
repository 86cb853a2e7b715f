"""KL: a distribution's distance from another, by the definition and by its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmcompress.models import divergence
from llmcompress.models.divergence import floored_kl, kl, log_probs, tables


def pair(tokens: int = 7, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(tokens, vocabulary, generator=generator)
    return first, first + 0.3 * torch.randn(tokens, vocabulary, generator=generator)


def test_it_is_the_definition() -> None:
    first, second = pair()
    p, q = (torch.softmax(side.double(), -1).numpy() for side in (first, second))
    assert kl(log_probs(first), log_probs(second)).numpy() == pytest.approx((p * np.log(p / q)).sum(-1), rel=1e-12)


def test_never_negative_zero_for_equals_and_without_regard_to_a_constant() -> None:
    first, second = pair(200)
    values = kl(log_probs(first), log_probs(second))
    assert bool((values >= 0).all())
    assert bool((kl(log_probs(first), log_probs(first)) == 0).all())
    assert torch.allclose(kl(log_probs(first), log_probs(second.double() + 5)), values, rtol=1e-6, atol=1e-9)


def test_float32_is_near_float64_and_keeps_the_gradient() -> None:
    first, second = pair()
    second.requires_grad_()
    narrow = kl(log_probs(first, torch.float32), log_probs(second, torch.float32))
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), kl(log_probs(first), log_probs(second)), atol=1e-5)
    narrow.sum().backward()
    expected = torch.softmax(second.detach(), -1) - torch.softmax(first, -1)  # dKL/dlogits of the second
    assert second.grad is not None and torch.allclose(second.grad, expected, atol=1e-5)


def test_a_folded_entry_of_no_mass_counts_nothing() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.75, 0.0]]).log()
    assert torch.isfinite(floored_kl(p, q)).all() and not torch.isfinite(kl(p, q)).all()
    assert float(floored_kl(p, q)) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-6)


def test_tables_a_few_tokens_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()
    whole = list(tables(first, second))
    monkeypatch.setattr(divergence, "TABLE_BYTES", 8 * 11 * 3)
    parts = list(tables(first, second))
    assert len(whole) == 1 and [tokens for tokens, _, _ in parts] == [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert torch.cat([p for _, p, _ in parts]).equal(whole[0][1])
    assert torch.cat([q for _, _, q in parts]).equal(whole[0][2])
