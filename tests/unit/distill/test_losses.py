"""Losses against their formulas in float64 NumPy, scipy, and their defining properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr, softmax

from llmcompress.distill import losses

T, V = 7, 23


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (T, V)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_scipys_relative_entropy(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p, q = (np.exp(log_softmax(x.numpy() / temperature, axis=-1)) for x in (teacher, student))
    q_log, p_log = losses.log_probs(student, temperature), losses.log_probs(teacher, temperature)
    np.testing.assert_allclose(losses.forward_kl(q_log, p_log), rel_entr(p, q).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(losses.reverse_kl(q_log, p_log), rel_entr(q, p).sum(-1), rtol=1e-12)


def test_half_jensen_shannon_is_scipys() -> None:
    student, teacher = losses.log_probs(logits(0)), losses.log_probs(logits(1))
    expected = jensenshannon(teacher.exp().numpy(), student.exp().numpy(), axis=-1) ** 2
    np.testing.assert_allclose(losses.jensen_shannon(student, teacher, 0.5), expected, rtol=1e-10)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_generalized_jensen_shannon_is_its_definition(beta: float) -> None:
    student, teacher = losses.log_probs(logits(0)), losses.log_probs(logits(1))
    p, q = teacher.exp().numpy(), student.exp().numpy()
    m = beta * p + (1 - beta) * q
    expected = beta * rel_entr(p, m).sum(-1) + (1 - beta) * rel_entr(q, m).sum(-1)
    got = losses.jensen_shannon(student, teacher, beta)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    assert float(got.max()) <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


def test_jensen_shannon_tends_to_the_kls() -> None:
    student, teacher = losses.log_probs(logits(0)), losses.log_probs(logits(1))
    near_zero = losses.jensen_shannon(student, teacher, 1e-6) / 1e-6
    near_one = losses.jensen_shannon(student, teacher, 1 - 1e-6) / 1e-6
    np.testing.assert_allclose(near_zero, losses.forward_kl(student, teacher), rtol=1e-2)
    np.testing.assert_allclose(near_one, losses.reverse_kl(student, teacher), rtol=1e-2)


@pytest.mark.parametrize("loss", [losses.forward_kl, losses.reverse_kl, losses.jensen_shannon])
def test_impossible_tokens_give_a_finite_loss_and_gradient(loss: object) -> None:
    student = logits(0).requires_grad_()
    teacher = losses.log_probs(logits(1).masked_fill(torch.arange(V) > 3, -math.inf))
    value = loss(losses.log_probs(student), teacher).sum()  # type: ignore[operator]
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("loss", [losses.forward_kl, losses.reverse_kl, losses.jensen_shannon])
def test_gradient_is_the_numerical_one(loss: object) -> None:
    teacher = losses.log_probs(logits(1), 2.0)
    function = lambda x: loss(losses.log_probs(x, 2.0), teacher)  # type: ignore[operator] # noqa: E731
    assert torch.autograd.gradcheck(function, logits(0).requires_grad_())


def test_temperature_squared_keeps_the_size_of_the_gradient() -> None:
    """For temperatures far above the logits the gradient tends to (z_student - z_teacher) / V (Hinton et al., eq. 4)."""
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (logits(0), logits(1)))
    student.requires_grad_()
    temperature = 1e4
    pair = losses.log_probs(student, temperature), losses.log_probs(teacher, temperature)
    losses.tempered(losses.forward_kl(*pair), temperature).sum().backward()
    np.testing.assert_allclose(student.grad, (student - teacher).detach() / V, rtol=1e-2, atol=1e-3)


def test_cross_entropy_ignores_what_has_no_label() -> None:
    labels = torch.tensor([3, -100, 0, 1, 2, -100, 5])
    got = losses.cross_entropy(logits(0), labels)
    expected = -log_softmax(logits(0).numpy(), axis=-1)[np.arange(T), np.maximum(labels, 0)] * (labels.numpy() >= 0)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_hidden_losses() -> None:
    a, b = logits(0), logits(1)
    np.testing.assert_allclose(losses.hidden_mse(a, b), ((a - b).numpy() ** 2).mean(-1), rtol=1e-6)
    norm = np.linalg.norm
    cosine = (a * b).numpy().sum(-1) / norm(a.numpy(), axis=-1) / norm(b.numpy(), axis=-1)
    np.testing.assert_allclose(losses.hidden_cosine(a, b), 1 - cosine, rtol=1e-5, atol=1e-6)


def test_attention_losses_know_a_causal_mask() -> None:
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    student, teacher = (
        logits(seed, 2, 3, 5, 5).masked_fill(~causal, -math.inf).softmax(-1).requires_grad_() for seed in (0, 1)
    )
    got = losses.attention_kl(student, teacher)
    expected = rel_entr(teacher.detach().numpy(), student.detach().numpy()).sum(-1).mean(1)
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-5, atol=1e-7)
    squared = ((student - teacher).detach().numpy() ** 2).sum(-1).mean(1)
    np.testing.assert_allclose(losses.attention_mse(student, teacher).detach(), squared, rtol=1e-5)
    got.sum().backward()
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]


def test_masked_tokens_never_count() -> None:
    values = torch.tensor([1.0, math.nan, 3.0, math.inf], requires_grad=True)
    mean = losses.masked_mean(values, torch.tensor([True, False, True, False]))
    mean.backward()
    assert mean == 2 and values.grad.tolist() == [0.5, 0, 0.5, 0]  # type: ignore[union-attr]
    assert losses.masked_mean(values, torch.zeros(4, dtype=torch.bool)) == 0


def mixture(teachers: list[tuple[torch.Tensor, float]], combine: losses.Combine, temperature: float) -> torch.Tensor:
    mixed = losses.Mixture(combine, temperature)
    for logits_TV, share in teachers:
        mixed.add(logits_TV, share)
    return mixed.log_probs()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_several_teachers_are_an_ensemble_or_a_product_of_experts(temperature: float) -> None:
    a, b = logits(0).float(), logits(1).float()
    teachers = [(a, 0.3), (b, 0.7)]
    wide = [x.double().numpy() / temperature for x in (a, b)]
    mixed = mixture(teachers, "probabilities", temperature).exp()
    np.testing.assert_allclose(mixed, 0.3 * softmax(wide[0], -1) + 0.7 * softmax(wide[1], -1), rtol=2e-5)
    mixed = mixture(teachers, "logits", temperature)
    np.testing.assert_allclose(mixed, log_softmax(0.3 * wide[0] + 0.7 * wide[1], -1), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_a_share_of_one_is_the_teacher_itself(combine: losses.Combine) -> None:
    a = logits(0).float()
    assert torch.equal(mixture([(a, losses.shares([2.0, 0.0])[0])], combine, 2.0), losses.log_probs(a, 2.0))
