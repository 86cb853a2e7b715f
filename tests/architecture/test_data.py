"""What is declared in YAML is valid, complete, and travels in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.architecture.sources import ROOT

RECIPES = sorted((ROOT / "llmcompress" / "recipes").glob("*.yaml"))
SUITES = sorted((ROOT / "eval" / "suites").glob("*.yaml"))
CALIBRATION = sorted((ROOT / "calibration").glob("*.yaml"))
TASKS = sorted((ROOT / "eval" / "tasks").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path) -> None:
    from llmcompress.config import recipe

    by_name = recipe.load(path.stem)
    assert recipe.load(str(path)) == by_name


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_suite_is_valid(path: Path) -> None:
    from llmcompress.evaluate.suite import load_suite

    assert load_suite(path.stem).name == path.stem


@pytest.mark.parametrize("path", CALIBRATION, ids=lambda path: path.stem)
def test_calibration_set_is_valid(path: Path) -> None:
    from llmcompress.data.calibration_spec import CalibrationSpec

    assert CalibrationSpec.find(path.stem).name == path.stem


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_task_has_its_data(path: Path) -> None:
    declared = yaml.safe_load(path.read_text(encoding="utf-8"))
    files = declared.get("dataset_kwargs", {}).get("data_files", {})
    for file in files.values() if isinstance(files, dict) else [files]:
        assert (path.parent / file).is_file(), f"{path.name} names {file}, which is not there"


def test_there_is_data_to_ship() -> None:
    assert RECIPES and SUITES and CALIBRATION and TASKS


@pytest.mark.slow
def test_wheel_carries_the_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"SOURCE_DATE_EPOCH": "1767225600"})
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
    for top in ("calibration", "eval"):
        for path in (ROOT / top).rglob("*"):
            name = str(path.relative_to(ROOT))
            if path.is_file() and "__pycache__" not in path.parts:
                assert (f"llmcompress/_data/{name}" in packed) is not name.startswith("eval/results/"), name
    for folder in ("recipes", "guides"):
        for path in (ROOT / "llmcompress" / folder).iterdir():
            assert f"llmcompress/{folder}/{path.name}" in packed
    assert {"llmcompress/py.typed", "llmcompress/training/fsdp.yaml"} <= packed
