from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from llmcompress.data.calibration import CalibrationSpec, load_calibration
from llmcompress.data.sources import read_dataset
from llmcompress.errors import LLMCompressError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local dataset of twenty rows; its cache lies beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [json.dumps({"body": f"w{number} w{number}", "id": number}) + "\n" for number in range(20)]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def test_a_column_in_order(folder: Path) -> None:
    found = read_dataset(str(folder), None, "train", None, "body")
    assert [document.content for document in found] == [f"w{number} w{number}" for number in range(20)]
    assert found[3].where == f"dataset {folder} train[3]"


def test_a_set_of_a_dataset(folder: Path, words: PreTrainedTokenizerFast) -> None:
    values = {"name": "mine", "dataset": {"path": str(folder), "split": "train"}, "field": "body"}
    found = load_calibration(CalibrationSpec.model_validate(values), words, num_samples=6, seq_len=10)
    assert found.tokens_NS.shape == (6, 10)
    assert found.provenance.source == "rows, split train"


def test_a_missing_column_names_those_present(folder: Path) -> None:
    with pytest.raises(LLMCompressError, match="no column 'text'; columns present: body, id"):
        read_dataset(str(folder), None, "train", None, "text")


@pytest.mark.parametrize(
    ("path", "split"), [("someone/not-here", "train"), ("a/b/c/d", "train"), ("rows", "no such split")]
)
def test_what_cannot_be_loaded_is_one_line(folder: Path, path: str, split: str) -> None:
    with pytest.raises(LLMCompressError) as caught:
        read_dataset(str(folder) if path == "rows" else path, None, split, None, "text")
    problem, hint = caught.value.lines()
    assert problem.startswith("dataset ") and "cannot be loaded" in problem and "\n" not in problem
    assert "network" in hint
