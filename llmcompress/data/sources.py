"""The one place that talks to `datasets`: columns and rows of a Hub dataset (or of a local folder of data files)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from llmcompress.data.documents import Document
from llmcompress.errors import LLMCompressError


def read_dataset(path: str, name: str | None, split: str, revision: str | None, field: str) -> list[Document]:
    """The column `field` of a split, in the dataset's order; downloads what is not cached.

    `path` is a Hub dataset id or a folder, `name` one of its configurations, `revision` a commit, tag or branch.

    Raises: LLMCompressError when it is unknown, private, empty, or cannot be reached and is not cached, and when it
    has no such configuration, split or column.
    """
    shown, table = _loaded(path, name, split, revision)
    if field not in table.column_names:
        present = ", ".join(sorted(table.column_names)) or "none"
        raise LLMCompressError(f"{shown}: no column {field!r}; columns present: {present}", "name the right `field`")
    if not len(table):
        raise LLMCompressError(f"{shown}: split {split!r} is empty", "choose another split")
    return [Document(f"{shown} {split}[{row}]", content) for row, content in enumerate(table[field])]


def read_table(path: str, name: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    """Every row of a split as an object, in the dataset's order.

    Raises: LLMCompressError when it is unknown, private, or cannot be reached and is not cached.
    """
    return [dict(row) for row in _loaded(path, name, split, revision)[1]]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Every row of a Parquet file as an object.

    Raises: LLMCompressError for a file that is not Parquet.
    """
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            return [dict(row) for row in table]
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            raise LLMCompressError(f"{path}: cannot be read as Parquet ({first})", "check the file") from error


def _loaded(path: str, name: str | None, split: str, revision: str | None) -> tuple[str, Any]:
    """What the dataset is called in messages, and its table."""
    import datasets
    from datasets.exceptions import DatasetsError

    shown = f"dataset {path}" + (f" ({name})" if name else "") + (f" at {revision}" if revision else "")
    try:
        return shown, datasets.load_dataset(path, name, split=split, revision=revision)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LLMCompressError(
            f"{shown}: split {split!r} cannot be loaded ({first})",
            "check the name, the split and the network (HF_HUB_OFFLINE unset), or use a local .txt or .jsonl file",
        ) from error
