"""Distillation of encoders: masked, classification, sentence embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.config.recipe import load
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import Distillation, RunReport
from tests import tiny_models

Make = Callable[..., Path]


def score(found: Distillation, metric: str) -> Any:
    return next(one for one in found.scores if one.metric == metric)


@pytest.mark.parametrize("auto, losses, metric", [
    ("AutoModelForMaskedLM", {"forward_kl": 5, "ce": 2, "hidden_cosine": 1}, "perplexity"),
    ("AutoModelForSequenceClassification", {"embedding": 1, "hidden_mse": 1, "attention_mse": 1, "forward_kl": 1}, "accuracy"),
    pytest.param("AutoModel", {}, "cosine to the teacher", marks=pytest.mark.slow),
])  # fmt: skip
def test_encoders(distill: Any, tmp_path: Path, auto: str, losses: dict[str, float], metric: str) -> None:
    import transformers

    teacher = tiny_models.save_encoder(
        tmp_path / "teacher", auto, **({"num_labels": 3} if "Classification" in auto else {})
    )
    phases = {"phase_frac": 0.5} if "attention_mse" in losses else {}
    verify: list[Any] = [{"verify": {}}, {"card": {}}] if auto == "AutoModel" else []
    found = distill(teacher, stages=verify, keep=0.5, losses=losses, training={"max_steps": 12}, **phases)
    assert score(found, metric).after is not None and found.kind in ("masked", "classification", "embedding")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2
    if metric.startswith("cosine"):
        assert score(found, metric).after > score(found, metric).before


@pytest.mark.slow
@pytest.mark.parametrize("name, auto, changes", [
    ("tinybert", "AutoModelForSequenceClassification", {"num_labels": 3}),
    ("distilbert", "AutoModelForMaskedLM", {}),
])  # fmt: skip
def test_shipped_recipes_run_with_another_teacher_and_other_rows(
    data: Path, tmp_path: Path, name: str, auto: str, changes: dict[str, int]
) -> None:
    teacher = tiny_models.save_encoder(tmp_path / "teacher", auto, layers=12, **changes)
    said = [f"model={teacher}", f"output={tmp_path / 'out'}", f"distill.data.path={data}"]
    run(load(name, [*said, "distill.training.max_steps=4"]), Silent())
    report = RunReport.load(tmp_path / "out")
    found = report.distillation
    assert found is not None and "layers 0, 2, 4, 7, 9, 11 of 12" in found.student
    assert found.layer_maps == (["5:11"] if name == "distilbert" else ["0:1,1:3,2:5,3:7,4:9,5:11"])
    assert len(found.losses) == (3 if name == "distilbert" else 4) and all(check.passed for check in report.checks)
