"""Where a report lies: OUT/llmcompress/report.json, which is also what makes a folder ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmcompress.errors import LLMCompressError, shown, third_party
from llmcompress.files import write_atomic
from llmcompress.report.upgrade import upgrade

FOLDER = "llmcompress"
FILE = "report.json"
VERSION = 2


def is_ours(folder: Path) -> bool:
    """Whether llmcompress wrote the checkpoint in `folder`."""
    return (folder / FOLDER / FILE).is_file()


def write(folder: Path, content: str) -> Path:
    """Write the report of `folder`, whole or not at all; returns its path."""
    return write_atomic(folder / FOLDER / FILE, content)


def read(folder: Path) -> dict[str, Any]:
    """The values of the report of `folder`, those of an older version brought up to this one.

    Raises: LLMCompressError when there is none, it is no JSON object, or a later llmcompress wrote it.
    """
    path = folder / FOLDER / FILE
    if not is_ours(folder):
        raise LLMCompressError(f"{path}: not found", "only a folder that llmcompress wrote has a report")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LLMCompressError(f"{path}: not a report ({shown(error, 120)})") from error
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise LLMCompressError(f"{path}: not a report (it has no version number)")
    if version > VERSION:
        raise LLMCompressError(
            f"{path}: a report of version {version}; this llmcompress reads up to {VERSION}", "update it"
        )
    if version == VERSION:
        return dict(data)
    with third_party(f"{path}: not a report of version {version}"):
        return upgrade(data)
