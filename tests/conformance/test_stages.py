"""What holds for every stage: it declares itself, is cheap to import, and keeps the promises of `config/stage.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmcompress.config.recipe import Recipe
from llmcompress.config.stage import STAGES, Stage, Step, rank, stage, stages
from llmcompress.errors import LLMCompressError
from llmcompress.report import RunReport
from tests.architecture.sources import ROOT
from tests.unit.card.sample_report import full_report, minimal_report

HEAVY = ("torch", "transformers", "lm_eval", "matplotlib", "bitsandbytes", "numba", "datasets", "peft")
every_stage = pytest.mark.parametrize("kind", stages(), ids=lambda kind: kind.name)
REQUIRED = {
    "finetune": {"data": {"path": "rows.jsonl"}},
    "distill": {"data": {"path": "rows.jsonl"}},
    "evaluate": {"suite": "tiny"},
}
"""The settings without a default."""


def test_importing_every_stage_imports_no_engine() -> None:
    code = f"""
import sys
from llmcompress.config.stage import stages
stages()
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@every_stage
def test_it_says_what_it_is(kind: Stage) -> None:
    assert STAGES[kind.name].endswith(f":{type(kind).__name__}") and kind.kind in ("transform", "check")
    assert kind.help.endswith(".") and len(kind.help) <= 120
    assert kind.Settings.model_config["extra"] == "forbid" and kind.Settings.model_config["frozen"]
    assert (rank(kind.name) == 0) is (kind.kind == "transform")


@every_stage
def test_its_settings_survive_a_recipe(kind: Stage) -> None:
    data = {"model": "bundled/tiny", "output": "out", "stages": [{kind.name: REQUIRED.get(kind.name, {})}]}
    recipe = Recipe.of(data)
    assert Recipe.of(recipe.dump()) == recipe and recipe.stage(kind.name) == Step(kind, recipe.stages[0].settings)
    with pytest.raises(LLMCompressError, match="unknown key 'no_such_key'"):
        Recipe.of(data | {"stages": [{kind.name: REQUIRED.get(kind.name, {}) | {"no_such_key": 1}}]})


@every_stage
@pytest.mark.parametrize("report", [minimal_report(), full_report()], ids=["minimal", "full"])
def test_its_summary_is_lines_and_changes_nothing(kind: Stage, report: RunReport) -> None:
    before = report.model_dump_json()
    for line in kind.summary(report):
        assert line.startswith("  ") and "\n" not in line and not line.endswith(" ")
    assert all(isinstance(problem, str) for problem in kind.failures(report))
    assert report.model_dump_json() == before


@every_stage
def test_a_transform_writes_below_its_output(kind: Stage) -> None:
    settings = kind.Settings.model_validate(REQUIRED.get(kind.name, {}))
    out = Path("some") / "out"
    assert all(folder == out or out in folder.parents for folder in kind.outputs(settings, out))
    assert len(kind.outputs(kind.one_output(settings), out)) == 1
    assert kind.problems(settings) == []


def test_an_unknown_stage_is_named_with_the_nearest() -> None:
    with pytest.raises(LLMCompressError, match="unknown stage 'quantise'") as caught:
        stage("quantise")
    assert caught.value.hint == "did you mean 'quantize'?"
