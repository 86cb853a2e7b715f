"""A file is whole or not there, and nothing lies beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmcompress.files import write_atomic


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "new" / "a.txt", "å\r\n")
    assert path.read_bytes() == "å\r\n".encode()
    assert write_atomic(path, b"\x00").read_bytes() == b"\x00"
    assert os.listdir(path.parent) == ["a.txt"]  # noqa: PTH208


def test_a_write_that_fails_leaves_the_old_file_and_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomic(tmp_path / "a", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
