"""Fine-tune, merge, quantize in one recipe: each stage once, resumed by key, and the report tells the whole story."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmcompress.card.build import card_text
from llmcompress.card.public import public
from llmcompress.card.view import kind
from llmcompress.config.recipe import Recipe, as_yaml
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from tests.unit.finetune.conftest import finetune, model, recipe, rows  # noqa: F401

QUANTIZE: dict[str, Any] = {"quantize": {"scheme": "W4A16", "method": "gptq", "group_size": 32}}


def statuses(report: RunReport) -> dict[str, str]:
    return {row.name: row.status for row in report.stages}


def test_the_whole_chain(model: Path, rows: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    stages: list[dict[str, Any]] = [{"merge": {}}, QUANTIZE, {"verify": {}}, {"card": {}}]
    built = recipe(model, out, rows, *stages, adapter="qlora")
    report = run(built, Silent())[out]
    assert statuses(report) == dict.fromkeys(["finetune", "merge", "quantize", "verify", "card"], "done")
    merge, survival = report.merge, report.adapter_retention
    assert report.source is not None and report.source.name == str(model) and report.finetune is not None
    assert merge is not None and merge.kl_dequantized is not None and merge.kl_original is not None
    assert merge.closer == "dequantized" and merge.kl_dequantized < 1e-8 < merge.kl_original
    assert report.calibration is not None and report.calibration.name == "training data"
    assert survival is not None and len(survival.linears) == 14 and survival.kl is not None
    assert 0.5 < survival.kept < 1.5 and survival.kl_rtn is not None

    stages_folder = tmp_path / ".out.stages"
    assert {path.name.partition("-")[0] for path in stages_folder.iterdir()} == {"finetune", "merge"}
    again = run(built, Silent())[out]
    assert statuses(again) | {"card": "done"} == dict.fromkeys(
        ["finetune", "merge", "quantize", "verify"], "reused"
    ) | {"card": "done"}
    other = recipe(model, tmp_path / "out", rows, {"merge": {}}, {"quantize": {"scheme": "NF4", "method": "rtn"}},
                   adapter="qlora")  # fmt: skip
    with pytest.raises(LLMCompressError, match=r"holds the result of another recipe \(different: .*quantize.scheme"):
        run(other, Silent())
    changed = run(other, Silent(), overwrite=True)[out]
    assert statuses(changed) == {"finetune": "reused", "merge": "reused", "quantize": "done"}
    assert changed.finetune == report.finetune

    shown = public(report)
    text = card_text(shown, {})
    assert str(tmp_path) not in text and "How it was fine-tuned" in text
    assert "What quantizing kept of the adapter" in text and "closer" in text
    assert "| **of the gain kept** |" in text and "this file" in text and kind(shown) == "quantized"


def test_an_adapter_alone_has_a_card_and_a_figure(model: Path, rows: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "adapter"
    report = run(recipe(model, out, rows, {"card": {}}, adapter="adalora"), Silent())[out]
    assert (out / "README.md").is_file() and (out / "llmcompress" / "figures" / "training.png").is_file()
    card = (out / "README.md").read_text()
    assert (
        kind(report) == "adapter"
        and "average rank 4" in card
        and "PeftModel.from_pretrained" in card
        and str(tmp_path) not in card
    )


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (["finetune", "quantize"], "stage quantize after finetune, which makes an adapter"),
        (["finetune", "distill"], "stage distill after finetune"),
        (["finetune", "verify", "check"], "stage check after finetune"),
        (["merge", "merge"], "stage merge after merge"),
        (["verify", "merge"], "stage merge after verify"),
    ],
)
def test_an_order_that_cannot_work_is_refused(stages: list[str], said: str) -> None:
    filled: dict[str, Any] = {"finetune": {"data": "rows.jsonl"}}
    with pytest.raises(LLMCompressError, match=said):
        Recipe.of({"model": "m", "output": "o", "stages": [{name: filled.get(name, {})} for name in stages]})


def test_an_adapter_is_verified_and_evaluated_without_a_merge() -> None:
    filled: dict[str, Any] = {"finetune": {"data": "rows.jsonl"}, "evaluate": {"suite": "tiny"}}
    names = ["finetune", "verify", "evaluate", "measure", "card"]
    built = Recipe.of({"model": "m", "output": "o", "stages": [{name: filled.get(name, {})} for name in names]})
    assert [stage.name for stage in built.stages] == names


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_with_the_same_curve(model: Path, rows: Path, tmp_path: Path) -> None:  # noqa: F811
    """kill -9 in the middle of the training, as a machine that goes down would."""
    settings: dict[str, Any] = {"adapter": "lora", "training": {"max_steps": 80, "save_every": 5}}
    built = recipe(model, tmp_path / "out", rows, **settings)
    file = tmp_path / "recipe.yaml"
    file.write_text(as_yaml(built.dump()))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmcompress", "run", str(file)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    marks = tmp_path / ".out.partial" / "training"
    for _ in range(1200):
        if len(list(marks.glob("checkpoint-*/complete"))) >= 1:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    resumed = run(built, Silent())[tmp_path / "out"].finetune
    whole = run(recipe(model, tmp_path / "whole", rows, **settings), Silent())[tmp_path / "whole"].finetune
    assert resumed is not None and whole is not None and resumed.training.resumed_from
    assert resumed.training.curve == whole.training.curve and resumed.heldout_loss == whole.heldout_loss
