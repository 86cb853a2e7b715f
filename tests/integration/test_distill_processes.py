"""Two processes that `accelerate launch` starts distill together: the losses of one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.report import Distillation, RunReport
from llmcompress.run import run
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
        assert 0 < both.on_policy.own_batches < 4 and both.scores[1].after < both.scores[1].before  # type: ignore[operator]
        return
    run(Recipe.of(recipe("one", 8)), Silent())
    wanted = [point.loss for point in found("one").training.curve]
    assert [point.loss for point in both.training.curve] == pytest.approx(wanted, rel=1e-5)
