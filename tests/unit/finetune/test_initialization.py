"""First factors: the best that there are, for the weight or for what the layer computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.finetune.initialization import residual_factors
from tests.unit.finetune.conftest import Finetune


def output_error(residual: torch.Tensor, b: torch.Tensor, a: torch.Tensor, x: torch.Tensor) -> float:
    return float((((residual - b @ a) @ x.t()) ** 2).sum())


def test_weighted_by_inputs_the_outputs_are_closer_and_nothing_found_by_descent_is_better() -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(24, 32, generator=generator)
    x = torch.randn(400, 32, generator=generator) * torch.logspace(0, -2, 32)
    hessian = x.t() @ x / len(x)
    plain, weighted = residual_factors(residual, 4, None), residual_factors(residual, 4, hessian)
    best = output_error(residual, *weighted, x)
    assert best < 0.7 * output_error(residual, *plain, x)
    b, a = (factor.clone().requires_grad_() for factor in weighted)
    optimizer = torch.optim.LBFGS([b, a], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (((residual - b @ a) @ x.t()) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert output_error(residual, b.detach(), a.detach(), x) >= best * 0.99
    assert float(((residual - plain[0] @ plain[1]) ** 2).sum()) == pytest.approx(
        float((torch.linalg.svdvals(residual)[4:] ** 2).sum()), rel=1e-5
    )


def test_a_rank_above_the_matrix_is_filled_up_and_exact() -> None:
    residual = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for hessian in (None, torch.eye(8), torch.zeros(8, 8)):
        b, a = residual_factors(residual, 5, hessian)
        assert b.shape == (3, 5) and a.shape == (5, 8)
        assert torch.allclose(b @ a, residual, atol=1e-4)


def test_training_begins_closer_to_the_full_precision_model(finetune: Finetune, tmp_path: Path) -> None:
    full = finetune("full", adapter="lora").finetune
    starts = {}
    for init in ("default", "loftq", "residual"):
        part = finetune(init, adapter="qlora", init=init, rank=16, data={"seq_len": 64}).finetune
        assert part is not None and part.heldout_loss_initial is not None and full is not None
        starts[init] = abs(part.heldout_loss_initial - (full.heldout_loss_base or 0))
        assert (part.heldout_loss_initial == part.heldout_loss_base) == (init == "default")
    assert starts["residual"] < starts["default"] and starts["loftq"] < starts["default"]
