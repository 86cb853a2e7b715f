"""A checkpoint with tokenizer and calibration text, and a short way to compress it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.report import RunReport
from llmcompress.run import run
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
