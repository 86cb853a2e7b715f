"""Distillation of encoders: masked, classification, sentence embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.report import Distillation
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
