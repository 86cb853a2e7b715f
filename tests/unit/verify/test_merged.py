"""A merged checkpoint is verified too: its weights' digests, its tensors, its source's tokenizer, and that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import Check, RunReport
from llmcompress.verify.fresh import checks
from llmcompress.verify.stage import Request, VerifySettings
from tests.unit.finetune.conftest import model, recipe, rows  # noqa: F401


@pytest.fixture
def merged(model: Path, rows: Path, tmp_path: Path) -> Path:  # noqa: F811
    training = {"max_steps": 1}
    run(recipe(model, tmp_path / "out", rows, {"merge": {"measure": False}}, training=training), Silent())
    return tmp_path / "out"


def failed(folder: Path) -> dict[str, str]:
    found: list[Check] = list(checks(Request(folder=folder, settings=VerifySettings())))
    assert [one.name for one in found] == ["files", "tensors", "side files", "generation"]
    return {one.name: one.detail for one in found if not one.passed}


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")


def other_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 123.0}))


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def test_as_it_was_written_it_passes(merged: Path) -> None:
    assert failed(merged) == {}
    assert RunReport.load(merged).merge is not None


@pytest.mark.parametrize(
    ("spoil", "check", "said"),
    [
        (other_tokenizer, "side files", "tokenizer.json is not the source's"),
        (other_config, "side files", "config.json: rope_theta differs"),
        (other_weights, "files", "model.safetensors has changed"),
    ],
)
def test_what_was_changed_afterwards_is_named(
    spoil: Callable[[Path], None], check: str, said: str, merged: Path
) -> None:
    spoil(merged)
    assert said in failed(merged)[check]


def test_a_source_that_is_gone_is_said(merged: Path, model: Path) -> None:  # noqa: F811
    model.rename(model.with_name("moved"))
    found = {one.name: one for one in checks(Request(folder=merged, settings=VerifySettings()))}
    assert not found["side files"].ran and "the source is not there" in found["side files"].detail
