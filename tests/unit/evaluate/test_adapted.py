"""An adapter as it is measured: the same logits as plain PEFT gives, and refused on a base that is another by now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.evaluate import adapted, engines
from llmcompress.pipeline.run import run
from tests.unit.evaluate.conftest import WORDS


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter that was trained on it."""
    place = tmp_path_factory.mktemp("adapted")
    base = Path(shutil.copytree(dense, place / "base"))
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": " ".join(WORDS[at : at + 9])}) + "\n" for at in range(8)))
    training = {"max_steps": 4, "batch_size": 2, "learning_rate": 0.02}
    finetune = {"adapter": "lora", "rank": 2, "data": {"path": str(rows), "seq_len": 32}, "training": training}
    run(Recipe.of({"model": str(base), "output": str(place / "adapter"), "stages": [{"finetune": finetune}]}), Silent())
    return base, place / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(2, 18)[None]).logits
    return found


def test_base_and_adapter_compute_what_plain_peft_does(trained: tuple[Path, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = trained
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, adapter).eval())
    loaded = engines.load(adapter)
    torch.testing.assert_close(logits(loaded.model), expected, rtol=0, atol=0)
    assert (expected - before).abs().max() > 0.01, "the adapter changes nothing, so nothing was tested"
    assert loaded.engine.startswith("peft ") and "held in full precision" in loaded.note
    assert engines.max_positions(adapter) == 64 and adapted.is_adapter(adapter) and not adapted.is_adapter(base)


def test_without_a_report_the_config_names_the_base(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    other = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    shutil.rmtree(other / "llmcompress")
    assert adapted.base_of(other).folder == base
    torch.testing.assert_close(logits(engines.load(other).model), logits(engines.load(adapter).model))
    config = json.loads((other / "adapter_config.json").read_text())
    for value in (None, ""):
        (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": value}))
        with pytest.raises(LLMCompressError, match="names no base"):
            adapted.base_of(other)


def test_a_base_that_changed_or_is_gone_is_refused(trained: tuple[Path, Path]) -> None:
    base, adapter = trained
    config = base / "config.json"
    kept = config.read_text()
    config.write_text(kept.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    try:
        assert config.read_text() != kept
        with pytest.raises(LLMCompressError, match="no longer the checkpoint that this adapter was trained on"):
            engines.load(adapter)
        base.rename(base.with_name("moved"))
        with pytest.raises(LLMCompressError, match="base"):
            engines.load(adapter)
    finally:
        if not base.exists():
            base.with_name("moved").rename(base)
        config.write_text(kept)
