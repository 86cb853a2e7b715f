"""The one reader of rows: every format gives the same rows with their places, and what is wrong is named by line."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llmcompress.data.calibration import CalibrationSpec, load_calibration
from llmcompress.data.sources import Document, is_file, is_text, pick, read_rows, read_text, require_sha256, texts
from llmcompress.errors import LLMCompressError


def _write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def _lines(path: Path, field: str = "text") -> list[str]:
    with pytest.raises(LLMCompressError) as caught:
        pick(*read_rows(str(path)), field)
    return caught.value.lines()


def _read(path: Path, field: str = "text") -> list[Document]:
    return pick(*read_rows(str(path)), field)


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "\n\n  one\ntwo\n \t\n\n\nthree\r\n\r\nfour\n")
    assert _read(path) == [
        Document(f"{path}:3", "  one\ntwo"),
        Document(f"{path}:8", "three"),
        Document(f"{path}:10", "four"),
    ]


def test_a_text_without_blank_lines_is_one_document(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "\ufeffone\ntwo\nthree\n")
    assert _read(path) == [Document(f"{path}:1", "one\ntwo\nthree")]


def test_each_json_line_is_a_row(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"body": "one\u2028still"}\n\n{"body": ["x"], "id": 1}\r\n')
    assert _read(path, "body") == [Document(f"{path}:1", "one\u2028still"), Document(f"{path}:3", ["x"])]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=8)


@settings(deadline=None, max_examples=20)
@given(rows=st.lists(st.tuples(cells, cells.map(lambda cell: "x" + cell)), min_size=1, max_size=6))
def test_every_format_gives_the_same_rows(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    objects = [{"a": first, "b": second} for first, second in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    (folder / "rows.json").write_text(json.dumps(objects))
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("a", "b"), *rows])
    datasets.Dataset.from_list(objects).to_parquet(folder / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet"):
        read, rejected = read_rows(str(folder / name))
        assert [row.fields for row in read] == objects and not rejected, name


def test_rows_of_a_table_are_named_by_their_first_line_and_misfits_are_told(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", 'a,b\n1,"two\nlines"\n3\n\n4,5,6\n7,8\n')
    rows, rejected = read_rows(str(path))
    assert [(row.where.rpartition(":")[2], row.fields["a"]) for row in rows] == [("2", "1"), ("7", "7")]
    assert [row.where.rpartition(":")[2] for row in rejected] == ["4", "6"]
    assert {row.reason for row in rejected} == {"not as many cells as the header (2)"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,a\n1,2\n", "the header has a name twice or none"),
        ("a.csv", "a\n" + "x" * 200_000, "a.csv:2: not CSV"),
        ("a.json", "{}", "a dict, not a list"),
        ("a.json", "[", "not JSON"),
        ("a.parquet", "no", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_is_broken_as_a_whole(tmp_path: Path, name: str, text: str, message: str) -> None:
    assert message in _lines(_write(tmp_path / name, text))[0]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"text": "good"}\n{"text": \n["text"]\n{"body": 1, "author": 2}\n')
    shown = [line for line in _lines(path) if not line.startswith("hint")]
    assert [line.split(": ")[0] for line in shown] == [f"{path}:2", f"{path}:3", f"{path}:4"]
    assert "not JSON" in shown[0]
    assert "not an object" in shown[1]
    assert shown[2].endswith("no field 'text'; fields present: author, body")


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"body": 1}\n' * 13)
    shown = [line for line in _lines(path) if not line.startswith("hint")]
    assert len(shown) == 11
    assert shown[-1] == "and 3 more problems like these"


def test_deep_nesting_is_a_malformed_line(tmp_path: Path) -> None:
    assert "a.jsonl:1: not JSON" in _lines(_write(tmp_path / "a.jsonl", "[" * 200_000))[0]


def test_a_missing_file_another_kind_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    assert "nothing.txt: no such file" in _lines(tmp_path / "nothing.txt")[0]
    assert "text is read from .jsonl, .json" in _lines(_write(tmp_path / "a.doc", "x"))[0]
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert "byte 3 is not UTF-8" in _lines(tmp_path / "a.txt")[0]


def test_a_folder_is_a_dataset_and_a_name_with_a_suffix_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    assert not is_file(str(tmp_path)) and not is_file(str(tmp_path / "folder.csv")) and not is_file("org/name")
    assert is_file("rows.csv") and is_file("./rows") and is_file("~/rows")


def test_the_stated_sha256_must_match(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "one")
    true = hashlib.sha256(b"one").hexdigest()
    require_sha256(path, true)
    with pytest.raises(LLMCompressError, match=f"sha256 is {true}, {'0' * 64} was stated"):
        require_sha256(path, "0" * 64)
    with pytest.raises(LLMCompressError, match="cannot be read"):
        require_sha256(tmp_path / "gone.txt", true)


def test_held_out_text_is_a_file_as_it_is_or_a_field_of_every_row(tmp_path: Path) -> None:
    assert read_text(_write(tmp_path / "a.txt", " one\n\n\ntwo\r\n"), "text") == " one\n\n\ntwo\n"
    for name, text in (("a.csv", "body,n\none,1\n,2\ntwo,3\n"), ("a.json", '[{"body": "one"}, {"body": "two"}]')):
        assert read_text(_write(tmp_path / name, text), "body") == "one\n\ntwo"
    for name in ("b.txt", "b.jsonl", "b.csv"):
        with pytest.raises(LLMCompressError, match="no text in it"):
            read_text(_write(tmp_path / name, "\n \n" if name != "b.csv" else "text\n"), "text")


def test_texts_leaves_blanks_out_and_refuses_the_rest() -> None:
    assert texts([Document("a:1", "x"), Document("a:2", " \n"), Document("a:3", "y")]) == ["x", "y"]
    with pytest.raises(LLMCompressError, match="a:1: this document and all after it are blank"):
        texts([Document("a:1", " ")])
    with pytest.raises(LLMCompressError) as caught:
        texts([Document("a:1", 5), Document("a:2", []), Document("a:3", "\ud83d")])
    assert [line.split(":")[1] for line in caught.value.lines() if line.startswith("a")] == ["1", "2", "3"]
    assert any("chat_template: true" in line for line in caught.value.lines())


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert is_text("😀")
    assert not is_text("\ud83d")
    assert not is_text(None)


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
    rows, _ = read_rows(str(folder))
    assert [row.fields["body"] for row in rows] == [f"w{number} w{number}" for number in range(20)]
    assert rows[3].where == f"dataset {folder} train[3]"


def test_a_set_of_a_dataset(folder: Path, words: PreTrainedTokenizerFast) -> None:
    values = {"name": "mine", "dataset": {"path": str(folder), "split": "train"}, "field": "body"}
    calibration = load_calibration(CalibrationSpec.model_validate(values), words, num_samples=6, seq_len=10)
    assert calibration.tokens_NS.shape == (6, 10)
    assert calibration.provenance.source == "rows, split train"
    values["field"] = "text"
    with pytest.raises(LLMCompressError, match="no field 'text'; fields present: body, id"):
        load_calibration(CalibrationSpec.model_validate(values), words)


@pytest.mark.parametrize(
    ("path", "split"), [("someone/not-here", "train"), ("a/b/c/d", "train"), ("rows", "no such split")]
)
def test_what_cannot_be_loaded_is_one_line(folder: Path, path: str, split: str) -> None:
    with pytest.raises(LLMCompressError) as caught:
        read_rows(str(folder) if path == "rows" else path, None, split)
    problem, hint = caught.value.lines()
    assert problem.startswith("dataset ") and "cannot be loaded" in problem and "\n" not in problem
    assert "network" in hint
