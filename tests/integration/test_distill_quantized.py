"""Distillation with a quantized end: students trained on their grid, and teachers of every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import Distillation, RunReport

Make = Callable[..., Path]


def score(found: Distillation, metric: str) -> Any:
    return next(one for one in found.scores if one.metric == metric)


@pytest.mark.parametrize("scheme", ["W3A16", pytest.param("NF4", marks=pytest.mark.slow)])
def test_a_quantized_student_is_trained_on_its_grid(
    make: Make, compress: Any, distill: Any, tmp_path: Path, scheme: str
) -> None:
    teacher = make()
    compress(teacher, tmp_path / "small", scheme=scheme)
    before = RunReport.load(tmp_path / "small")
    found = distill(
        teacher, stages=[{"verify": {}}, {"card": {}}], student=str(tmp_path / "small"),
        training={"max_steps": 4, "learning_rate": 2e-3}, adapter={"rank": 8},
    )  # fmt: skip
    assert found.grid is not None and found.grid.num_linears == 14 and 0 < found.grid.changed_codes_frac < 0.5
    after = RunReport.load(tmp_path / "out")
    assert after.output is not None and before.output is not None
    assert (after.output.format, after.output.weights_bytes) == (before.output.format, before.output.weights_bytes)
    assert [row.scheme for row in after.linears] == [row.scheme for row in before.linears]
    assert all(check.passed for check in after.checks) and len(after.checks) == 8
    config = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("small", "out")]
    assert config[0] == config[1]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W2A16"])
def test_training_on_the_grid_recovers_what_quantizing_lost(tmp_path: Path, scheme: str) -> None:
    """On trained weights, and on rows that the student was not trained on."""
    from llmcompress import resources

    text = resources.folder("calibration") / "tiny.jsonl"
    small, out = tmp_path / "small", tmp_path / "out"
    quantize = {"scheme": scheme, "group_size": 64, "method": "rtn"}
    data = {"path": str(text), "seq_len": 64, "heldout_frac": 0.1, "max_rows": 400}
    training = {"max_steps": 60, "learning_rate": 1e-3}
    head = {"model": "bundled/tiny", "seed": 0}
    run(Recipe.of(head | {"output": str(small), "stages": [{"quantize": quantize}]}), Silent())
    stage = {"data": data, "training": training, "student": str(small)}
    run(Recipe.of(head | {"output": str(out), "stages": [{"distill": stage}]}), Silent())
    found = RunReport.load(out).distillation
    assert found is not None
    kl = score(found, "KL to the teacher")
    assert kl.after < 0.9 * kl.before


@pytest.mark.parametrize("settings, foreign, said", [
    pytest.param(
        {"scheme": "NF4"}, False, "quantized (bitsandbytes); run with our own dequantized weights",
        marks=pytest.mark.slow,
    ),
    ({"scheme": "NF4"}, True, "quantized (bitsandbytes); run by transformers with that format's own package"),
    ({"scheme": "W4A16", "format": "gptq"}, False, "quantized (gptq); run with our own dequantized weights"),
])  # fmt: skip
def test_a_quantized_teacher(
    make: Make, compress: Any, distill: Any, tmp_path: Path, settings: dict[str, str], foreign: bool, said: str
) -> None:
    compress(make(), tmp_path / "small", **settings)
    if foreign:
        shutil.rmtree(tmp_path / "small" / "llmcompress")
    found = distill(tmp_path / "small", keep=0.5)
    assert any(said in note for note in found.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and RunReport.load(tmp_path / "out").output.format == "plain"  # type: ignore[union-attr]
