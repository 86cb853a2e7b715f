"""The gate in front of an evaluation: refused on seen items, let through when told so, and shown either way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.card.build import card_text
from llmcompress.errors import LLMCompressError, ProblemsError
from llmcompress.evaluate.overlap import overlaps
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.report import RunReport
from llmcompress.run import run


@pytest.fixture
def calibrated(
    dense: Path, declare: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Recipe]:
    """calibrated(text): a recipe that calibrates on it and is then asked the suite's items."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))

    def build(text: str, **changes: Any) -> Recipe:
        (tmp_path / "calibration.txt").write_text(text)
        quantize = {"calibration": str(tmp_path / "calibration.txt"), "num_samples": 8, "seq_len": 32, "group_size": 32}
        evaluate = {"suite": str(declare()), "engine": "dequantized"} | changes
        stages = [{"quantize": quantize | {"format": "compressed_tensors"}}, {"evaluate": evaluate}]
        return Recipe.of({"model": str(dense), "output": str(tmp_path / "out"), "stages": stages})

    return build


def held_out(declare: Callable[..., Path]) -> str:
    return (declare().parent / "text.txt").read_text()


def test_text_that_holds_the_items_is_refused(
    calibrated: Callable[..., Recipe], declare: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        LLMCompressError, match=r"share 13 words in a row with the calibration set .* at most 1\.0%"
    ) as error:
        run(calibrated(held_out(declare)), Silent())
    assert "--allow-overlap" in str(error.value.hint) and "words:" in error.value.message
    report = RunReport.load(tmp_path / "out")
    assert report.stages[-1].status == "failed" and not report.evaluations


def test_allowed_overlap_is_in_the_report_and_on_the_card(
    calibrated: Callable[..., Recipe], declare: Callable[..., Path]
) -> None:
    report = next(iter(run(calibrated(held_out(declare), allow_overlap=True), Silent()).values()))
    evaluation = report.evaluations[0]
    found = {row.part: row for row in evaluation.overlaps}
    assert evaluation.overlap_allowed and found["words"].share and found["words"].share > 0.5
    assert found["choose"].num_items == found["choose"].num_short == 12
    card = card_text(report, "out", None, None)
    assert "items of `words`**, which was allowed" in card and "Seen before? " in card


def test_other_text_passes(calibrated: Callable[..., Recipe]) -> None:
    text = " ".join(["the cat sees the old dog and a bird hears the new dog but a small bird likes the cat ."] * 40)
    evaluation = next(iter(run(calibrated(text), Silent()).values())).evaluations[0]
    assert [row.num_found for row in evaluation.overlaps] == [0, 0] and not evaluation.overlap_allowed


def test_calibration_text_that_is_gone_is_said(calibrated: Callable[..., Recipe], tmp_path: Path) -> None:
    text = " ".join(["the cat sees the old dog and a bird hears the new dog but a small bird likes the cat ."] * 40)
    report = next(iter(run(calibrated(text), Silent()).values()))
    (tmp_path / "calibration.txt").write_text(text.replace("cat", "dog"))
    assert (
        overlaps(report, {"x": []})[0].note
        == "not looked into: the text of that name is no longer the one that was calibrated on"
    )
    (tmp_path / "calibration.txt").unlink()
    row = overlaps(report, {"x": []})[0]
    assert row.share is None and row.note is not None and "calibration.txt" in row.note


def test_training_rows_are_looked_into_whatever_their_fields(calibrated: Callable[..., Recipe], tmp_path: Path) -> None:
    text = " ".join(["the cat sees the old dog and a bird hears the new dog but a small bird likes the cat ."] * 40)
    report = next(iter(run(calibrated(text), Silent()).values()))
    item = "which of these is the capital of the land of Kelissa : Dorn"
    rows = [
        {"prompt": "which of these is the capital", "completion": "of the land of Kelissa : Dorn"},
        {"messages": [{"content": "x"}]},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.recipe["stages"].insert(0, {"finetune": {"data": str(tmp_path / "train.jsonl")}})
    found = {
        row.text: row
        for row in overlaps(report, {"facts": [item, "nothing of the kind was ever said there by anyone"]})
    }
    assert found["finetune data train.jsonl"].num_found == 1
    report.recipe["stages"][0]["finetune"]["data"] = "org/dataset"
    assert any("no text file" in str(row.note) for row in overlaps(report, {"facts": [item]}))


def test_problems_are_said_all_at_once() -> None:
    from llmcompress.evaluate.overlap import refuse
    from llmcompress.report import Overlap

    rows = [
        Overlap(text="calibration set a", part=part, num_items=4, num_found=2, share=0.5, example="x") for part in "pq"
    ]
    with pytest.raises(ProblemsError) as error:
        refuse(rows, 0.01, "own")
    assert len(error.value.problems) == 2
    refuse(rows, 0.5, "own")
