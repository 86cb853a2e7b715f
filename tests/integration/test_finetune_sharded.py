"""FSDP: two processes that hold half a model each train as one does with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import Finetune, RunReport
from llmcompress.training.sharding import CONFIG
from tests import tiny_models
from tests.integration.conftest import Compress

ROOT = Path(__file__).resolve().parents[2]
TRAINED = "adapter_model.safetensors"
COMMAND = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--main_process_port", "0"]


def launch(recipe: Path) -> subprocess.Popen[str]:
    """`accelerate launch` with the shipped configuration, which starts two processes, on CPUs."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*COMMAND, "-m", "llmcompress", "run", str(recipe)],
        env=os.environ | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def go(recipe: dict[str, Any], folder: Path) -> str:
    """Run it in two processes; what they said."""
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    process = launch(path)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-6000:]
    return said


def found(folder: Path) -> Finetune:
    """What the report says of the training, in which every check passed."""
    report = RunReport.load(folder)
    assert report.finetune is not None and report.checks and all(check.passed for check in report.checks)
    return report.finetune


@pytest.fixture
def recipe(make: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    source, rows = make("llama-tied"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": tiny_models.words(5 + 3 * (n % 7), seed=n)}) + "\n" for n in range(44)))

    def of(out: str, batch_size: int, source: Path = source, **settings: Any) -> dict[str, Any]:
        training = {"max_steps": 5, "batch_size": batch_size, "learning_rate": 1e-2} | settings.pop("training", {})
        stage = {"data": {"path": str(rows), "seq_len": 32}, "rank": 4, "training": training} | settings
        return {"model": str(source), "output": str(tmp_path / out), "stages": [{"finetune": stage}]}

    return of


@pytest.mark.parametrize("settings", [
    {"adapter": "qlora"},
    pytest.param({"adapter": "lora", "training": {"accumulation": 2, "max_grad_norm": 0.1}}, marks=pytest.mark.slow),
    pytest.param({"adapter": "qlora", "double_quant": True, "rslora": True, "training": {"gradient_checkpointing": True}},
                 marks=pytest.mark.slow),
    pytest.param({"adapter": "lora", "base": "stored"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_two_that_share_a_model_train_as_one_does_with_twice_the_batch(
    settings: dict[str, Any], recipe: Callable[..., dict[str, Any]], compress: Compress, tmp_path: Path
) -> None:
    """Adapters are equal to their first rounding, so PEFT, which loads the one, loads the other."""
    settings = dict(settings)
    if settings.get("base") == "stored":
        compress(Path(recipe("", 1)["model"]), tmp_path / "nf4", method="rtn", scheme="NF4", format="bitsandbytes")
        settings = settings | {"source": tmp_path / "nf4", "base": "auto"}
    go(recipe("both", 4, **settings), tmp_path)
    run(Recipe.of(recipe("one", 8, **settings)), Silent())
    both, one = found(tmp_path / "both"), found(tmp_path / "one")
    assert both.training.num_processes == 2
    assert both.training.effective_batch == one.training.effective_batch
    assert "sharded over 2 processes by FSDP, of which the first held 50%" in RunReport.load(tmp_path / "both").notes[0]
    assert both.base_weights == one.base_weights
    for name in ("heldout_tokens", "heldout_loss_base", "heldout_loss_initial", "heldout_loss"):
        assert getattr(both, name) == pytest.approx(getattr(one, name), rel=1e-6), name
    assert both.training.trained_parameters == one.training.trained_parameters
    for here, there in zip(both.training.curve, one.training.curve, strict=True):
        assert here.loss == pytest.approx(there.loss, rel=1e-5)
        assert here.gradient_norm == pytest.approx(there.gradient_norm, rel=1e-4)
    ours, theirs = (load_file(tmp_path / out / TRAINED) for out in ("both", "one"))
    assert ours.keys() == theirs.keys() and any(float(value.abs().max()) > 0.02 for value in theirs.values())
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_that_were_killed_go_on_with_the_same_losses(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = {"adapter": "qlora", "dropout": 0.1, "training": {"max_steps": 60, "save_every": 4}}
    path = tmp_path / "killed.json"
    path.write_text(json.dumps(recipe("killed", 4, **settings)))
    began, until = launch(path), time.monotonic() + 200
    while not list(tmp_path.glob(".killed.*/training/checkpoint-*/complete")):
        assert began.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    for process in [psutil.Process(began.pid), *psutil.Process(began.pid).children(recursive=True)]:
        process.kill()  # workers have sessions of their own
    began.communicate()
    assert not (tmp_path / "killed").exists()
    assert "goes on from the checkpoint of step" in go(recipe("killed", 4, **settings), tmp_path)
    go(recipe("whole", 4, **settings), tmp_path)
    killed, whole = found(tmp_path / "killed"), found(tmp_path / "whole")
    assert killed.training.resumed_from and whole.training.resumed_from is None
    assert killed.training.curve == whole.training.curve
    assert killed.heldout_loss_base == whole.heldout_loss_base and killed.heldout_loss == whole.heldout_loss
    assert (tmp_path / "killed" / TRAINED).read_bytes() == (tmp_path / "whole" / TRAINED).read_bytes()
