"""Reproduce: the same bytes again, and when they are not, which input is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from tests import tiny_models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layouts of one calibrated run, with the text that it was calibrated on beside them."""
    root = tmp_path_factory.mktemp("reproduce")
    source = tiny_models.save(root / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(source)
    (root / "text.txt").write_text(tiny_models.words(3000))
    quantize = {"group_size": 32, "calibration": str(root / "text.txt"), "num_samples": 8, "seq_len": 32}
    stages = [{"quantize": quantize | {"format": ["gptq", "compressed_tensors"]}}]
    run(Recipe.of({"model": str(source), "output": str(root / "out"), "stages": stages}), Silent())
    return root


def test_the_same_bytes_come_out_again_and_nothing_is_left(made: Path, tmp_path: Path) -> None:
    before = sorted(made.rglob("*"))
    found = reproduce(made / "out" / "compressed_tensors", None, Silent())
    assert found.same and found.files == {"config.json": True, "model.safetensors": True} and not found.reasons
    assert sorted(made.rglob("*")) == before
    kept = reproduce(made / "out" / "gptq", tmp_path / "again", Silent())
    assert kept.same and (tmp_path / "again" / "gptq" / "model.safetensors").is_file()


def test_other_text_is_named_as_the_reason(made: Path) -> None:
    text = (made / "text.txt").read_text()
    (made / "text.txt").write_text(tiny_models.words(3000, seed=1))
    try:
        found = reproduce(made / "out" / "gptq", None, Silent())
    finally:
        (made / "text.txt").write_text(text)
    assert not found.same and not found.files["model.safetensors"]
    assert "the calibration text gives other tokens" in found.reasons
    assert any("linears have other codes" in reason for reason in found.reasons)


def test_what_was_tampered_with_since_is_found(made: Path) -> None:
    folder = made / "out" / "gptq"
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"bits": 4', '"bits": 8'))
    try:
        assert reproduce(folder, None, Silent()).files["config.json"] is False
    finally:
        (folder / "config.json").write_text(config)


def test_other_versions_are_named(made: Path) -> None:
    folder = made / "out" / "gptq"
    before = RunReport.load(folder)
    report = before.model_copy(deep=True)
    assert report.output is not None
    report.output.digests["model.safetensors"] = "0" * 64
    report.environment.libraries["torch"] = "1.0"
    report.save(folder)
    try:
        assert any(reason.startswith("torch was 1.0 and is ") for reason in reproduce(folder, None, Silent()).reasons)
    finally:
        before.save(folder)


def test_a_folder_without_a_recipe_and_a_source_that_is_gone(made: Path, tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match=r"report\.json: not found"):
        reproduce(made / "model", None, Silent())
    report = RunReport.load(made / "out" / "gptq")
    report.recipe["model"] = str(tmp_path / "gone")
    report.save(tmp_path / "moved")
    with pytest.raises(LLMCompressError, match="no such folder"):
        reproduce(tmp_path / "moved", None, Silent())
    report.recipe["stages"] = [{"verify": {}}]
    report.save(tmp_path / "moved")
    with pytest.raises(LLMCompressError, match="no stage that makes a checkpoint"):
        reproduce(tmp_path / "moved", None, Silent())
