"""Running: stages in order, each done once, evidence written down whatever happens, nothing of others replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline import run as run_module
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from tests import tiny_models


class Heard(Silent):
    """Progress that remembers its messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(folder)
    return folder


def recipe(model: Path, out: Path, *stages: dict[str, Any], **quantize: Any) -> Recipe:
    settings = {"method": "rtn", "group_size": 32} | quantize
    return Recipe.of({"model": str(model), "output": str(out), "stages": [{"quantize": settings}, *stages]})


VERIFY, CARD = {"verify": {}}, {"card": {}}


def statuses(report: RunReport) -> dict[str, str]:
    return {row.name: row.status for row in report.stages}


def test_a_second_run_does_nothing_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(recipe(model, out, VERIFY, CARD), Silent())[out]
    assert statuses(first) == {"quantize": "done", "verify": "done", "card": "done"}
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    heard = Heard()
    second = run(recipe(model, out, VERIFY, CARD), heard)[out]
    assert statuses(second) == {"quantize": "reused", "verify": "reused", "card": "done"}
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert "quantize: done before, kept" in heard.messages and "verify: done before, kept" in heard.messages
    assert second.checks == first.checks and second.linears == first.linears


def test_a_changed_setting_of_evidence_takes_that_evidence_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe(model, out, VERIFY), Silent())
    again = run(recipe(model, out, {"verify": {"forward": False}}), Silent())[out]
    assert statuses(again) == {"quantize": "reused", "verify": "done"} and len(again.checks) == 5
    fresh = run(recipe(model, out, {"verify": {"forward": False}}), Silent(), fresh=True)[out]
    assert statuses(fresh)["verify"] == "done"


def test_another_recipe_is_refused_and_named_unless_asked_for(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe(model, out), Silent())
    with pytest.raises(LLMCompressError, match=r"another recipe \(different: quantize.scheme\)") as caught:
        run(recipe(model, out, scheme="W8A16"), Silent())
    assert "--overwrite" in (caught.value.hint or "")
    report = run(recipe(model, out, scheme="W8A16"), Silent(), overwrite=True)[out]
    assert report.linears[0].scheme == "int8 g32 sym"


def test_other_calibration_text_is_another_run(model: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny_models.words(3000))
    settings = {"method": "gptq", "calibration": str(text), "num_samples": 4, "seq_len": 32}
    run(recipe(model, out, **settings), Silent())
    text.write_text(tiny_models.words(3000, seed=1))
    with pytest.raises(LLMCompressError, match="the source, the calibration text or our version"):
        run(recipe(model, out, **settings), Silent())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_ours_is_never_replaced(kind: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    with pytest.raises(LLMCompressError, match=r"not written by llmcompress|is a file"):
        run(recipe(model, out), Silent(), overwrite=True)
    assert (out if kind == "file" else out / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("below", ["", "inside", ".."])
def test_a_run_never_writes_over_what_it_reads(below: str, model: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(LLMCompressError, match=r"overlaps the source|not written by llmcompress"):
        run(recipe(model, model / below), Silent())
    assert sorted(path.name for path in model.iterdir()) == before


def test_a_stage_that_fails_leaves_a_row_and_the_next_run_takes_it_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.verify import stage

    out, verify = tmp_path / "out", stage.verify

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise LLMCompressError("the disk is on fire")

    monkeypatch.setattr(stage, "verify", broken)
    with pytest.raises(LLMCompressError, match="on fire"):
        run(recipe(model, out, VERIFY), Silent())
    row = next(row for row in RunReport.load(out).stages if row.name == "verify")
    assert (row.status, row.error) == ("failed", "the disk is on fire")
    monkeypatch.setattr(stage, "verify", verify)
    assert statuses(run(recipe(model, out, VERIFY), Silent())[out]) == {"quantize": "reused", "verify": "done"}


def test_a_shard_that_lost_its_tail_is_made_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = run(recipe(model, out), Silent())[out]
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    again = run(recipe(model, out), Silent())[out]
    assert statuses(again) == {"quantize": "done"} and again.output == whole.output


def test_several_layouts_are_several_folders_with_a_report_each(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reports = run(recipe(model, out, VERIFY, CARD, format=["gptq", "compressed_tensors"]), Silent())
    assert list(reports) == [out / "gptq", out / "compressed_tensors"]
    assert all((folder / "README.md").is_file() and report.checks for folder, report in reports.items())
    assert sorted(path.name for path in out.iterdir()) == ["compressed_tensors", "gptq"]


def test_stage_key_follows_all_that_the_work_depends_on() -> None:
    stage = Recipe.of({"model": "m", "output": "o", "stages": [VERIFY]}).stages[0]
    other = Recipe.of({"model": "m", "output": "o", "stages": [{"verify": {"forward": False}}]}).stages[0]
    key = run_module.stage_key("id", stage, "files", 0)
    assert key == run_module.stage_key("id", stage, "files", 0)
    changed = [
        ("ie", stage, "files", 0),
        ("id", other, "files", 0),
        ("id", stage, "file", 0),
        ("id", stage, "files", 1),
    ]
    assert key not in {run_module.stage_key(*arguments) for arguments in changed}
