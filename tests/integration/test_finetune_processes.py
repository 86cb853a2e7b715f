"""Two processes that `accelerate launch` starts train one adapter, as one process does with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmcompress.config.recipe import Recipe, as_yaml
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from tests.unit.finetune.conftest import model, recipe, rows  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
"""`--multi_gpu` is torchrun underneath and needs no GPU; `--cpu` would start one process."""


@pytest.mark.parametrize("adapter", ["qlora", pytest.param("adalora", marks=pytest.mark.slow)])
def test_two_processes_train_the_adapter_of_twice_the_batch(
    adapter: str, model: Path, rows: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    def built(out: str, batch_size: int) -> Recipe:
        return recipe(model, tmp_path / out, rows, adapter=adapter, training={"batch_size": batch_size})

    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(built("both", 2).dump()))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *LAUNCH, "-m", "llmcompress", "run", str(path), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["finetune"], "one process speaks"
    run(built("one", 4), Silent())
    both, one = (RunReport.load(tmp_path / out).finetune for out in ("both", "one"))
    assert both is not None and one is not None
    assert both.training.num_processes == 2 and both.training.effective_batch == one.training.effective_batch == 4
    found, wanted = ([point.loss for point in part.training.curve] for part in (both, one))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert both.heldout_loss == pytest.approx(one.heldout_loss, rel=1e-4)
    assert [one.rank for one in both.modules] == [one.rank for one in one.modules]
