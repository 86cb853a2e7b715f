"""A tiny checkpoint with a tokenizer, rows to train on, and a short way to fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from tests import tiny_models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty rows of prompt and completion, of several lengths."""
    path = tmp_path / "rows.jsonl"
    lines = []
    for seed in range(40):
        words = tiny_models.words(12 + seed % 7, seed).split()
        lines.append(json.dumps({"prompt": " ".join(words[:5]), "completion": " " + " ".join(words[5:])}))
    path.write_text("\n".join(lines) + "\n")
    return path


Finetune = Callable[..., RunReport]


def recipe(model: Path, out: Path, rows: Path, *stages: dict[str, Any], **settings: Any) -> Recipe:
    """A recipe that fine-tunes for a few steps, with `stages` behind it."""
    training = {"max_steps": 12, "batch_size": 4, "learning_rate": 0.01} | settings.pop("training", {})
    data = {"path": str(rows), "seq_len": 64} | settings.pop("data", {})
    stage = {"rank": 4, "adapter": "lora", "data": data, "training": training} | settings
    return Recipe.of({"model": str(model), "output": str(out), "stages": [{"finetune": stage}, *stages]})


@pytest.fixture
def finetune(model: Path, rows: Path, tmp_path: Path) -> Finetune:
    """finetune(adapter="qlora", …): the report of an adapter in tmp_path / "adapter"."""

    def go(out: str = "adapter", source: Path | None = None, **settings: Any) -> RunReport:
        folder = tmp_path / out
        return run(recipe(source or model, folder, rows, **settings), Silent())[folder]

    return go


def logits(model: Any, training: bool = False) -> torch.Tensor:
    """Of a fixed batch of tokens."""
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model.train(training)(input_ids=tokens, use_cache=False).logits.float()
    return found
