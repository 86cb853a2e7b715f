from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.evaluate.baseline import BaselineCache, cache_folder
from llmcompress.evaluate.harness import Item, TaskRun

RUN = TaskRun(
    task="t",
    items=[
        Item(
            doc_id=0,
            digest="d",
            scores={"acc,none": 0.1 + 0.2, "ll,none": float("-inf")},
            responses={"none": [[-1.5, True], [float("-inf"), False]]},
        )
    ],
)


def test_an_entry_comes_back_exactly(tmp_path: Path) -> None:
    heard: list[str] = []
    cache = BaselineCache(tmp_path / "deep" / "er", heard.append)
    assert cache.get("k") is None
    cache.put("k", RUN)
    assert cache.get("k") == RUN
    assert [path.name for path in cache.folder.iterdir()] == ["k.json"]
    assert heard == []


def test_a_damaged_entry_is_told_and_ignored(tmp_path: Path) -> None:
    heard: list[str] = []
    cache = BaselineCache(tmp_path, heard.append)
    cache.put("k", RUN)
    whole = (tmp_path / "k.json").read_bytes()
    for damaged in (whole[:-3], whole.replace(b'"doc_id":0', b'"doc_id":1'), b"", b"\xff\n{}"):
        (tmp_path / "k.json").write_bytes(damaged)
        assert cache.get("k") is None
    assert len(heard) == 4
    assert all("damaged" in line for line in heard)
    cache.put("k", RUN)
    assert cache.get("k") == RUN


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    heard: list[str] = []
    (tmp_path / "file").write_text("", encoding="utf-8")
    cache = BaselineCache(tmp_path / "file" / "below", heard.append)
    cache.put("k", RUN)
    assert cache.get("k") is None
    assert "not cached" in heard[0]


def test_the_folder_follows_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "evaluate"
    monkeypatch.delenv("LLMCOMPRESS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "llmcompress" / "evaluate"
