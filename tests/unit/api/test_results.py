"""Rows read as tables, artifacts as a summary."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.api.results import Artifact, Rows, table
from llmcompress.errors import LLMCompressError
from llmcompress.report import Check, Score, TaskResult


def task(**changes: object) -> TaskResult:
    values: dict[str, object] = {
        "task": "facts", "metric": "acc", "num_fewshot": 0, "num_items": 200, "baseline": Score(value=0.5),
        "compressed": Score(value=0.25), "difference": -0.25, "interval": (-0.3, -0.2), "budget": 0.02,
        "verdict": "fail", "dataset_path": "secret/place",
    }  # fmt: skip
    return TaskResult.model_validate(values | changes)


def test_rows_are_a_list_and_a_table() -> None:
    rows = Rows([Check(name="files", passed=True, detail="same"), Check(name="logits", passed=False, detail="far")])
    assert len(rows) == 2 and rows[0].name == "files"
    assert str(rows).splitlines()[0].split() == ["name", "passed", "detail", "ran"]
    assert str(rows).splitlines()[2].split() == ["logits", "no", "far", "yes"]
    assert rows.passed and repr(rows) == str(rows)


def test_failures_are_below_the_table() -> None:
    rows = Rows([Check(name="files", passed=False, detail="x")], failures=["check files: x"])
    assert not rows.passed and str(rows).endswith("\nFAILED check files: x")
    assert "<p>FAILED check files: x</p>" in rows._repr_html_()


def test_scores_numbers_and_intervals_are_cells_and_what_cards_need_is_not() -> None:
    ((cells,),) = Rows([task()]).tables()
    assert cells["baseline"] == "0.5" and cells["interval"] == "[-0.3, -0.2]" and cells["difference"] == "-0.25"
    assert "dataset_path" not in cells and "better" not in cells, "empty columns are left out"


def test_each_kind_of_row_has_its_table() -> None:
    rows = Rows([task(), Check(name="files", passed=True, detail="same")])
    assert len(rows.tables()) == 2 and str(rows).count("\n\n") == 1
    assert rows._repr_html_().count("<table>") == 2


def test_html_is_escaped() -> None:
    assert "&lt;b&gt;" in Rows([{"x": "<b>"}])._repr_html_() and "<b>" not in Rows([{"x": "<b>"}])._repr_html_()


def test_no_rows_is_said() -> None:
    assert str(Rows([])) == "(no rows)" and Rows([])._repr_html_() == ""


def test_table_aligns_its_columns() -> None:
    assert table([{"a": 1, "b": "x"}, {"a": 100, "b": "y"}]) == "a    b\n1    x\n100  y"


def test_a_folder_of_others_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match=r"report\.json: not found"):
        Artifact.open(tmp_path)
