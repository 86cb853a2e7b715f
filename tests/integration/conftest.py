"""A checkpoint with tokenizer and calibration text, and a short way to compress it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import Distillation, RunReport
from tests import tiny_models

Compress = Callable[..., RunReport]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make("llama", num_hidden_layers=3): a folder with a random model of that architecture and a tokenizer."""

    def build(name: str = "llama", max_shard_size: str = "5GB", **changes: Any) -> Path:
        config = tiny_models.configs()[name]
        for key, value in changes.items():
            setattr(config, key, value)
        folder = tiny_models.save(tmp_path / f"{name}-source", config, max_shard_size=max_shard_size)
        (tiny_models.save_qwen2_tokenizer if name == "qwen2" else tiny_models.save_tokenizer)(folder)
        (tmp_path / "text.txt").write_text(tiny_models.words(3000))
        return folder

    return build


@pytest.fixture
def compress(tmp_path: Path) -> Compress:
    """compress(model, out, **settings of quantize): run one quantize stage, small and quick by default."""

    def go(
        model: Path, out: Path | None = None, stages: list[dict[str, Any]] | None = None, **settings: Any
    ) -> RunReport:
        quick = {"calibration": str(tmp_path / "text.txt"), "num_samples": 16, "seq_len": 64, "batch_tokens": 256}
        quick |= {"group_size": 32} if settings.get("scheme", "W4A16")[0] == "W" else {}
        recipe = Recipe.of(
            {
                "model": str(model),
                "output": str(out or tmp_path / "out"),
                "stages": [{"quantize": quick | settings}, *(stages or [])],
            }
        )
        return next(iter(run(recipe, Silent()).values()))

    return go


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    texts = [tiny_models.words(24, seed=seed) for seed in range(40)]
    path.write_text("".join(json.dumps({"text": text, "label": n % 3}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture
def distill(tmp_path: Path, data: Path) -> Callable[..., Distillation]:
    """distill(teacher, out, **settings): run one stage of a few steps and give what the report says of it."""

    def go(
        teacher: Path, out: str = "out", stages: list[Any] | None = None, seed: int = 0, **settings: Any
    ) -> Distillation:
        training = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2} | settings.pop("training", {})
        stage = {"data": {"path": str(data), "seq_len": 32}, "training": training} | settings
        head = {"model": str(teacher), "output": str(tmp_path / out), "seed": seed}
        run(Recipe.of(head | {"stages": [{"distill": stage}, *(stages or [])]}), Silent())
        found = RunReport.load(tmp_path / out).distillation
        assert found is not None
        return found

    return go
