"""Several teachers: formulas in float64, and that weights of 0 and 1 are the single teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from llmcompress.distill.losses import log_probs
from llmcompress.distill.mixture import mix, shares


def logits(seed: int) -> torch.Tensor:
    return torch.randn(5, 11, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_formulas(temperature: float) -> None:
    a, b = logits(0), logits(1)
    asked = [(lambda: a, 0.3), (lambda: b, 0.7)]
    got = mix(asked, "probabilities", temperature).exp()
    wide = [x.double().numpy() / temperature for x in (a, b)]
    np.testing.assert_allclose(got, 0.3 * softmax(wide[0], -1) + 0.7 * softmax(wide[1], -1), rtol=2e-5)
    got = mix(asked, "logits", temperature)
    np.testing.assert_allclose(got, log_softmax(0.3 * wide[0] + 0.7 * wide[1], -1), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_a_share_of_one_is_the_teacher_itself(combine: str) -> None:
    a = logits(0)
    got = mix([(lambda: a, shares([2.0, 0.0])[0])], combine, 2.0)  # type: ignore[arg-type]
    assert torch.equal(got, log_probs(a, 2.0))
