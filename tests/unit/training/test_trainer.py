"""The trainer on a linear regression: the same weights as a plain loop of torch, and the same after an interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.report import Training
from llmcompress.training.failures import TrainingFailedError
from llmcompress.training.settings import TrainingSettings
from llmcompress.training.trainer import (
    COMPLETE,
    WEIGHTS,
    Guarded,
    last_checkpoint,
    load_trained,
    total_steps,
    train,
)

generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 3, generator=generator), torch.randn(16, 1, generator=generator)


class Regression(nn.Module):
    """Least squares; a part of it is frozen and must never be written or moved."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.weight = nn.Parameter(torch.tensor([[0.5], [-1.0], [2.0]]))
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        self.batches.append(len(x))
        return {"loss": (self.frozen * (x @ self.weight) - y).square().mean()}


def batch(rows: Any) -> dict[str, torch.Tensor]:
    return {"x": X[list(rows)], "y": Y[list(rows)]}


def settings(**changes: Any) -> TrainingSettings:
    plain = {"max_steps": 6, "batch_size": 16, "learning_rate": 0.05, "schedule": "constant", "warmup_frac": 0.0}
    return TrainingSettings(**(plain | changes))


def run(model: nn.Module, folder: Path, asked: TrainingSettings, num_rows: int = 16, **how: Any) -> Training:
    return train(
        model, list(range(num_rows)), asked, folder,  # type: ignore[arg-type]
        padding=0, seq_len=8, seed=0, progress=Silent(), batch=batch, **how,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_weights_are_those_of_a_plain_loop(schedule: str, tmp_path: Path) -> None:
    """AdamW, clipped gradients, weight decay, warm-up and the schedules, from their formulas."""
    steps, rate, decay, longest, warmup = 8, 0.05, 0.1, 0.5, 2
    model, plain = Regression(), Regression()
    report = run(
        model, tmp_path,
        settings(max_steps=steps, schedule=schedule, warmup_frac=warmup / steps, weight_decay=decay, max_grad_norm=longest),
    )  # fmt: skip
    optimizer = torch.optim.AdamW([plain.weight], lr=rate, weight_decay=decay)
    expected = []
    for step in range(steps):
        done = (step - warmup) / (steps - warmup)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
        optimizer.param_groups[0]["lr"] = rate * (step / warmup if step < warmup else shape)
        optimizer.zero_grad()
        loss = plain(X, Y)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_([plain.weight], longest)
        optimizer.step()
        expected.append(loss.item())
    assert [point.loss for point in report.curve] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(model.weight, plain.weight)
    assert report.steps == steps and report.trained_parameters == 3 and torch.equal(model.frozen, torch.ones(1))


def test_two_batches_a_step_are_one_of_twice_the_size(tmp_path: Path) -> None:
    whole, halves = Regression(), Regression()
    first = run(whole, tmp_path / "whole", settings())
    second = run(halves, tmp_path / "halves", settings(batch_size=8, accumulation=2))
    torch.testing.assert_close(whole.weight, halves.weight)
    assert first.effective_batch == second.effective_batch == 16


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "accumulation", "epochs"),
    [(16, 4, 1, 1.0), (15, 4, 1, 2.0), (13, 4, 3, 1.0), (5, 8, 4, 3.0), (16, 4, 2, 0.5)],
)
def test_steps_are_counted_as_the_trainer_of_transformers_counts_them(
    num_rows: int, batch_size: int, accumulation: int, epochs: float, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    asked = settings(max_steps=None, batch_size=batch_size, accumulation=accumulation, epochs=epochs)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model=Regression(), args=arguments, train_dataset=list(range(num_rows)),  # type: ignore[arg-type]
        data_collator=batch,
    )  # fmt: skip
    trainer.train()
    assert total_steps(num_rows, asked) == trainer.state.global_step
    assert total_steps(num_rows, asked.model_copy(update={"max_steps": 3})) == 3


class Counter:
    """A driver that counts the steps it was told of."""

    def __init__(self) -> None:
        self.total, self.steps = 0, 0

    def start(self, total_steps: int) -> None:
        self.total = total_steps

    def step(self, step: int) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(max_steps=9, batch_size=4, save_every=3)
    whole, counted = Regression(), Counter()
    expected = run(whole, tmp_path / "whole", asked, driver=counted)
    assert (counted.total, counted.steps) == (9, 9)
    original, calls = Guarded.training_step, iter(range(100))

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Guarded, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(Regression(), tmp_path / "killed", asked, driver=Counter())
    monkeypatch.setattr(Guarded, "training_step", original)
    (tmp_path / "killed" / "checkpoint-8").mkdir()  # a kill in the middle of writing
    resumed, counted = Regression(), Counter()
    report = run(resumed, tmp_path / "killed", asked, driver=counted)
    assert report.resumed_from == 6 and counted.steps == 9 and len(resumed.batches) == 3
    assert report.curve == expected.curve and torch.equal(resumed.weight, whole.weight)
    assert not (tmp_path / "killed" / "checkpoint-8").exists()


def test_a_checkpoint_holds_what_is_trained_alone(tmp_path: Path) -> None:
    model = Regression()
    run(model, tmp_path, settings(save_every=3))
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == "checkpoint-6"
    assert list(torch.load(checkpoint / WEIGHTS, weights_only=True)) == ["weight"]
    fresh = Regression()
    load_trained(fresh, checkpoint)
    assert torch.equal(fresh.weight, model.weight)
    (checkpoint / COMPLETE).unlink()
    earlier = last_checkpoint(tmp_path)
    assert earlier is not None and earlier.name == "checkpoint-3" and not checkpoint.exists()
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_loss_of_the_caller_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    model = Regression()
    run(model, tmp_path, settings(), loss=lambda model, rows, _: (model.weight.square().sum(), None))
    assert float(model.weight.detach().abs().max()) < 2.0 and not model.batches


def test_a_loss_that_is_no_number_ends_before_it_reaches_the_weights(tmp_path: Path) -> None:
    model = Regression()

    def loss(of: Any, rows: Any, _: Any) -> Any:
        value = of(**rows)["loss"]
        return value * (float("nan") if len(of.batches) == 5 else 1.0), None

    with pytest.raises(TrainingFailedError, match="the loss is not finite after step 4") as caught:
        run(model, tmp_path, settings(save_every=2), loss=loss)
    assert caught.value.checkpoint == tmp_path / "checkpoint-4" and torch.isfinite(model.weight).all()


def test_memory_that_ran_out_is_an_error_with_advice_and_other_errors_are_not(tmp_path: Path) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    def wrong(*_: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(LLMCompressError, match="out of memory with batch_size 16 and seq_len 8"):
        run(Regression(), tmp_path / "a", settings(), loss=full)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(Regression(), tmp_path / "b", settings(), loss=wrong)


def test_long_runs_have_a_curve_of_few_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompress.training import trainer

    monkeypatch.setattr(trainer, "MOST_POINTS", 4)
    report = run(Regression(), tmp_path, settings(max_steps=12, batch_size=4))
    assert [point.step for point in report.curve] == [3, 6, 9, 12]
