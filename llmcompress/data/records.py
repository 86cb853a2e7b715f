"""Rows of training data as they lie in a file: JSON lines, a JSON list, Parquet, or a dataset of the Hub.

    .jsonl     an object a line                     a bad line is counted and named, and the others are read
    .json      one list of objects
    .parquet   a table; a row is an object
    org/name   a split of a Hub dataset

Every row keeps its place, so that whatever is said of it later names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.data.sources import read_parquet, read_table
from llmcompress.errors import LLMCompressError

SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Record:
    """A row and its place: `file:line`, `file[row]` or the row of a dataset."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is not used, and the reason."""

    where: str
    reason: str


def is_file(path: str) -> bool:
    """Whether a `data` setting names a file and not a dataset of the Hub.

    >>> is_file("rows.jsonl"), is_file("org/name")
    (True, False)
    """
    return path.endswith(SUFFIXES) or path.startswith((".", "/", "~")) or Path(path).exists()


def read_records(
    path: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> tuple[list[Record], list[Rejected]]:
    """Every row of a file or a Hub dataset in its order, and the lines that are no row.

    Raises: LLMCompressError for a file that is missing, of another kind, not UTF-8 or no JSON list, and for a dataset
    that cannot be loaded.
    """
    if not is_file(path):
        table = read_table(path, config, split, revision)
        return [Record(f"dataset {path} {split}[{row}]", fields) for row, fields in enumerate(table)], []
    file = Path(path).expanduser()
    if not file.is_file():
        raise LLMCompressError(f"{path}: no such file", "give a .jsonl, .json or .parquet file, or a Hub dataset id")
    if file.suffix not in SUFFIXES:
        raise LLMCompressError(f"{path}: training data is {', '.join(SUFFIXES)}, not {file.suffix or 'such a file'}")
    if file.suffix == ".parquet":
        return [Record(f"{path}[{row}]", fields) for row, fields in enumerate(read_parquet(file))], []
    found = list(_lines(path, _text(file)) if file.suffix == ".jsonl" else _list(path, _text(file)))
    records = [one for one in found if isinstance(one, Record)]
    return records, [one for one in found if isinstance(one, Rejected)]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError as error:
        raise LLMCompressError(f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8") from error


def _lines(path: str, text: str) -> Iterator[Record | Rejected]:
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            yield Rejected(where, "not JSON")
            continue
        yield Record(where, value) if isinstance(value, dict) else Rejected(where, "not an object")


def _list(path: str, text: str) -> Iterator[Record | Rejected]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LLMCompressError(f"{path}: not JSON ({error})", "a .json file is one list of objects") from error
    if not isinstance(values, list):
        raise LLMCompressError(f"{path}: a {type(values).__name__}, not a list", "a .json file is one list of objects")
    for row, value in enumerate(values):
        where = f"{path}[{row}]"
        yield Record(where, value) if isinstance(value, dict) else Rejected(where, "not an object")
