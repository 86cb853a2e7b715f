"""Consent to run foreign code comes from the command line or the call, never out of a file that may be downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.config.recipe import CONSENT, Recipe, load
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.run import resumed_recipe, run
from llmcompress.report import RunReport
from tests import tiny_models

every_consent = pytest.mark.parametrize("key", CONSENT)


@every_consent
def test_a_recipe_file_cannot_consent(key: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: m\noutput: o\n{key}: true\nstages:\n  - verify: {{}}\n")
    flag = f"--{key.replace('_', '-')}"
    with pytest.raises(LLMCompressError, match=f"{key} is true there") as caught:
        load(file)
    assert flag in (caught.value.hint or "")
    assert getattr(load(file, [f"{key}=true"]), key) is True


def test_a_recipe_file_that_declines_is_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\noutput: o\ntrust_remote_code: false\nstages:\n  - verify: {}\n")
    assert load(file).trust_remote_code is False


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output whose report says that it was made with both consents, beside code that must not run."""
    root = tmp_path_factory.mktemp("consent")
    source = tiny_models.save(root / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(source)
    stages = [{"quantize": {"method": "rtn", "group_size": 32}}]
    run(Recipe.of({"model": str(source), "output": str(root / "out"), "stages": stages}), Silent())
    report = RunReport.load(root / "out")
    report.recipe |= dict.fromkeys(CONSENT, True)
    report.save(root / "out")
    return root / "out"


def test_a_report_cannot_consent(made: Path) -> None:
    with pytest.raises(LLMCompressError) as caught:
        resumed_recipe(made, [{"verify": {}}])
    assert all(f"--{key.replace('_', '-')}" in "\n".join(caught.value.lines()) for key in CONSENT)
    recipe = resumed_recipe(made, [{"verify": {}}], trust_remote_code=True, allow_pickle=True)
    assert recipe.trust_remote_code and recipe.allow_pickle


def test_a_reproduction_needs_its_own_consent_and_writes_no_cache(made: Path, tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match="trust_remote_code is true there"):
        reproduce(made, None, Silent(), allow_pickle=True)
    found = reproduce(made, None, Silent(), trust_remote_code=True, allow_pickle=True)
    assert found.same
