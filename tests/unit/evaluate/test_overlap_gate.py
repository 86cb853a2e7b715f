"""The gate in front of an evaluation: refused on seen items, let through when told so, and shown either way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.card.build import card_text
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError, ProblemsError
from llmcompress.evaluate.contamination import overlaps
from llmcompress.pipeline.run import run
from llmcompress.publish.contents import contents
from llmcompress.publish.gate import card_problems
from llmcompress.report import RunReport


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
    found = {row.part: row for row in evaluation.contamination}
    assert evaluation.contamination_allowed and found["words"].share and found["words"].share > 0.5
    assert found["choose"].num_items == found["choose"].num_too_short == 12
    card = card_text(report, {})
    assert "items of `words`**, which was allowed" in card and "Contamination: " in card


def test_other_text_passes(calibrated: Callable[..., Recipe]) -> None:
    text = " ".join(["the cat sees the old dog and a bird hears the new dog but a small bird likes the cat ."] * 40)
    evaluation = next(iter(run(calibrated(text), Silent()).values())).evaluations[0]
    assert [row.num_contaminated for row in evaluation.contamination] == [0, 0] and not evaluation.contamination_allowed


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


@pytest.fixture
def rows(declare: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows to train on that hold the suite's text, in two fields of a prompt and its answer."""
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    spoken = held_out(declare).split()
    found = [spoken[at : at + 20] for at in range(0, len(spoken), 20)]
    lines = [json.dumps({"prompt": " ".join(one[:9]) + " ", "completion": " ".join(one[9:])}) for one in found]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def made(model: Path, out: Path, *stages: dict[str, Any]) -> Path:
    run(Recipe.of({"model": str(model), "output": str(out), "stages": list(stages)}), Silent())
    return out


def training(rows: Path) -> dict[str, Any]:
    return {"data": {"path": str(rows), "seq_len": 32}, "training": {"max_steps": 1, "batch_size": 2}}


def finetuned(dense: Path, rows: Path, tmp_path: Path) -> Path:
    return made(dense, tmp_path / "adapter", {"finetune": training(rows) | {"adapter": "lora", "rank": 2}})


def merged(dense: Path, rows: Path, tmp_path: Path) -> Path:
    adapter = finetuned(dense, rows, tmp_path)
    return made(dense, tmp_path / "merged", {"merge": {"adapters": [str(adapter)], "measure": False}})


def one_recipe(dense: Path, rows: Path, tmp_path: Path) -> Path:
    quantize = {"method": "gptq", "group_size": 32, "format": "compressed_tensors"}
    stages = [
        {"finetune": training(rows) | {"adapter": "lora", "rank": 2}},
        {"merge": {"measure": False, "survival": False}},
        {"quantize": quantize},
    ]
    return made(dense, tmp_path / "chain", *stages)


def distilled(dense: Path, rows: Path, tmp_path: Path) -> Path:
    return made(dense, tmp_path / "half", {"distill": training(rows) | {"keep": 0.5}})


@pytest.mark.parametrize("make", [finetuned, merged, one_recipe, distilled])
def test_rows_that_it_was_trained_on_are_refused_and_shown_where_that_was_allowed(
    make: Callable[..., Path], dense: Path, rows: Path, declare: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make(dense, rows, tmp_path)
    stage = "distill" if make is distilled else "finetune"
    asked = {"suite": str(declare()), "engine": "dequantized"}
    recipe = RunReport.load(folder).recipe | {"output": str(folder)}

    def evaluated(**settings: Any) -> RunReport:
        stages = [{"evaluate": asked | settings}, {"card": {}}]
        return next(iter(run(Recipe.of(recipe | {"stages": stages}), Silent()).values()))

    with pytest.raises(LLMCompressError, match=rf"share 13 words in a row with the {stage} data train\.jsonl"):
        evaluated()
    report = evaluated(allow_overlap=True)
    found = {row.text: row for row in report.evaluations[0].contamination if row.part == "words"}
    assert found.keys() >= {f"{stage} data train.jsonl"} and not any(row.note for row in found.values())
    assert found[f"{stage} data train.jsonl"].share == pytest.approx(1.0)
    card = (folder / "README.md").read_text()
    assert f"**The {stage} data train.jsonl holds" in card and "which was allowed" in card
    assert not card_problems(card)
    sent = {file.name: file.content() for file in contents(folder, report, "me/repository").files}
    assert b"USER/" not in sent["README.md"]
    if make is finetuned:
        assert b'PeftModel.from_pretrained(base, "me/repository")' in sent["README.md"]
        assert "PEFT, on its base (loaded and compared)" in card and "## Size" not in card
    if make in (finetuned, merged):
        assert "Calibration set" not in card and "## Against its base" in card
    if make is one_recipe:
        assert found["calibration set training data"].num_contaminated > 0


def test_training_rows_are_looked_into_whatever_their_fields(
    dense: Path, rows: Path, declare: Callable[..., Path], tmp_path: Path
) -> None:
    report = RunReport.load(distilled(dense, rows, tmp_path))
    item = " ".join(held_out(declare).split()[2:17])
    found = overlaps(report, {"facts": [item, "nothing of the kind was ever said there by anyone"]})
    assert [(row.text, row.num_contaminated) for row in found] == [("distill data train.jsonl", 1)]
    rows.write_text(rows.read_text().replace("cat", "dog"))
    assert "no longer the one that was trained on" in str(overlaps(report, {"facts": [item]})[0].note)
    rows.unlink()
    assert "no such file" in str(overlaps(report, {"facts": [item]})[0].note)


def test_an_adapter_of_others_is_named_as_unknown(dense: Path, rows: Path, tmp_path: Path) -> None:
    adapter = finetuned(dense, rows, tmp_path)
    shutil.rmtree(adapter / "llmcompress")
    folder = made(dense, tmp_path / "merged", {"merge": {"adapters": [str(adapter)], "measure": False}})
    (row,) = overlaps(RunReport.load(folder), {"facts": ["x"]})
    assert row.text == "data of adapter adapter" and "what it was trained on is not known" in str(row.note)


def test_a_base_that_was_trained_is_followed_too(dense: Path, rows: Path, tmp_path: Path) -> None:
    first = distilled(dense, rows, tmp_path)
    folder = made(first, tmp_path / "small", {"quantize": {"method": "rtn", "group_size": 32}})
    assert [row.text for row in overlaps(RunReport.load(folder), {"x": []})] == ["distill data train.jsonl"]


def test_problems_are_said_all_at_once() -> None:
    from llmcompress.evaluate.contamination import refuse
    from llmcompress.report import Contamination

    rows = [
        Contamination(text="calibration set a", part=part, num_items=4, num_contaminated=2, share=0.5, example="x")
        for part in "pq"
    ]
    with pytest.raises(ProblemsError) as error:
        refuse(rows, 0.01, "own")
    assert len(error.value.problems) == 2
    refuse(rows, 0.5, "own")
