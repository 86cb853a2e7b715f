from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmcompress.data.documents import Document, is_text, read_documents, texts
from llmcompress.errors import LLMCompressError


def _write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def _lines(path: Path, field: str = "text", sha256: str | None = None) -> list[str]:
    with pytest.raises(LLMCompressError) as caught:
        read_documents(path, field, sha256)
    return caught.value.lines()


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "\n\n  one\ntwo\n \t\n\n\nthree\r\n\r\nfour\n")
    assert read_documents(path, "text") == [
        Document(f"{path}:3", "  one\ntwo"),
        Document(f"{path}:8", "three"),
        Document(f"{path}:10", "four"),
    ]


def test_a_text_without_blank_lines_is_one_document(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "\ufeffone\ntwo\nthree\n")
    assert read_documents(path, "text") == [Document(f"{path}:1", "one\ntwo\nthree")]


def test_each_json_line_is_a_document(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"body": "one\u2028still"}\n\n{"body": ["x"], "id": 1}\r\n')
    assert read_documents(path, "body") == [Document(f"{path}:1", "one\u2028still"), Document(f"{path}:3", ["x"])]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, text: str) -> None:
    assert "no text in it" in _lines(_write(tmp_path / name, text))[0]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"text": "good"}\n{"text": \n["text"]\n{"body": 1, "author": 2}\n')
    shown = [line for line in _lines(path) if not line.startswith("hint")]
    assert [line.split(": ")[0] for line in shown] == [f"{path}:2", f"{path}:3", f"{path}:4"]
    assert "not JSON" in shown[0]
    assert "a list, not an object" in shown[1]
    assert shown[2].endswith("no field 'text'; fields present: author, body")


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", '{"body": 1}\n' * 13)
    shown = [line for line in _lines(path) if not line.startswith("hint")]
    assert len(shown) == 11
    assert shown[-1] == "and 3 more problems like these"


def test_deep_nesting_is_a_malformed_line(tmp_path: Path) -> None:
    assert "a.jsonl:1: not JSON" in _lines(_write(tmp_path / "a.jsonl", "[" * 200_000))[0]


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "nothing.txt: cannot be read" in _lines(tmp_path / "nothing.txt")[0]
    (tmp_path / "folder.txt").mkdir()
    assert "folder.txt: cannot be read" in _lines(tmp_path / "folder.txt")[0]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 au lait")
    assert "byte 3 is not UTF-8" in _lines(path)[0]


def test_the_stated_sha256_must_match(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "one")
    true = hashlib.sha256(b"one").hexdigest()
    assert len(read_documents(path, "text", true)) == 1
    assert f"sha256 is {true}, {'0' * 64} was stated" in _lines(path, sha256="0" * 64)[0]


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
