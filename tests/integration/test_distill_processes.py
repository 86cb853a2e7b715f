"""Processes: two that `accelerate launch` starts train as one does with twice the batch, and one that is killed goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import Distillation, RunReport
from tests import tiny_models

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
"""`accelerate launch --multi_gpu`: it is torchrun underneath and needs no GPU; `--cpu` would start one process."""


@pytest.mark.parametrize("settings", [
    {"losses": {"forward_kl": 1, "hidden_mse": 1}},
    pytest.param({"losses": {"js": 1}, "cache": "cache", "temperature": 2}, marks=pytest.mark.slow),
    pytest.param({"on_policy": {"lmbda": 0.5, "max_new_tokens": 8}}, marks=pytest.mark.slow),
])  # fmt: skip
def test_two_processes_train_as_one_does_with_twice_the_batch(
    make: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    source, data = make("llama", num_hidden_layers=2), tmp_path / "rows.jsonl"
    texts = [tiny_models.words(5 + 3 * (n % 7), seed=n) for n in range(40)]
    data.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))

    def recipe(out: str, batch_size: int) -> dict[str, Any]:
        training = {"max_steps": 4, "batch_size": batch_size, "learning_rate": 1e-2}
        stage = {"data": {"path": str(data), "seq_len": 32}, "keep": 0.5, "training": training} | settings
        stage |= {"cache": str(tmp_path / f"{out}-cache")} if "cache" in settings else {}
        return {"model": str(source), "output": str(tmp_path / out), "stages": [{"distill": stage}]}

    def found(out: str) -> Distillation:
        said = RunReport.load(tmp_path / out).distillation
        assert said is not None
        return said

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe("both", 4)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH, "-m", "llmcompress", "run", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    both = found("both")
    assert both.training.num_processes == 2 and both.training.effective_batch == 8
    if both.on_policy is not None:  # what is written is drawn in every process, so there is nothing to compare with
        assert 0 < both.on_policy.student_batches < 4 and both.scores[1].after < both.scores[1].before  # type: ignore[operator]
        return
    run(Recipe.of(recipe("one", 8)), Silent())
    wanted = [point.loss for point in found("one").training.curve]
    assert [point.loss for point in both.training.curve] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_student(make: Callable[..., Path], tmp_path: Path) -> None:
    source, data = make("llama", num_hidden_layers=4), tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": tiny_models.words(24, seed=n)}) + "\n" for n in range(40)))

    def recipe(out: str) -> dict[str, Any]:
        training = {"max_steps": 60, "batch_size": 4, "learning_rate": 1e-3, "save_every": 4}
        losses = {"forward_kl": 1, "hidden_mse": 1}
        stage = {"data": {"path": str(data), "seq_len": 32}, "keep": 0.5, "losses": losses, "training": training}
        return {"model": str(source), "output": str(tmp_path / out), "stages": [{"distill": stage}]}

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe("killed")))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "llmcompress", "run", str(path)]
    began = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not list(tmp_path.glob(".killed.distill-*/training/checkpoint-*/complete")):
        assert began.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    began.kill()
    began.wait()
    assert not (tmp_path / "killed").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and "goes on from the checkpoint of step" in done.stderr, done.stderr[-3000:]
    run(Recipe.of(recipe("whole")), Silent())
    killed, whole = (RunReport.load(tmp_path / one) for one in ("killed", "whole"))
    assert killed.distillation is not None and whole.distillation is not None
    assert killed.distillation.training.resumed_from and whole.distillation.training.resumed_from is None
    assert killed.distillation.training.curve == whole.distillation.training.curve
    assert killed.output is not None and whole.output is not None and killed.output.digests == whole.output.digests
    assert not list(tmp_path.glob(".killed*"))
