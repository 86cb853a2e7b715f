"""The one reader of rows: text to calibrate on, to train on, to distill with and to be measured on.

    .jsonl     an object a line
    .json      one list of objects
    .parquet   a table; a row is an object
    .csv       a table with a header; every cell is a text
    .txt       documents, separated by blank lines; a row is {"text": document}
    org/name   a split of a Hub dataset, or of a local folder of data files (the one place that talks to `datasets`)

Every row keeps its place, so that whatever is said of it later names the file and the line. What is wrong with the file
as a whole is raised; a single line that is no row is given back with the reason. Training counts and names such lines
and goes on; calibration and evaluation, which have no use for a file that is half read, refuse them all at once
(`raise_some`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import LLMCompressError, raise_all

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
ACCEPTED = f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or a Hub dataset id"
MOST_SHOWN = 10
"""Of one file's problems this many are shown, then a count of the rest."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row and its place: `file:line`, `file[row]` or the row of a dataset. The values are not judged yet."""

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that is not used, and the reason."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Document:
    """One field of a row, its place, and the tools beside a conversation. Their types are not judged yet."""

    where: str
    content: object
    tools: object = None


def is_file(path: str) -> bool:
    """Whether a `data` setting names a file and not a dataset of the Hub or a folder of data files.

    >>> is_file("rows.jsonl"), is_file("org/name")
    (True, False)
    """
    local = Path(path).expanduser()
    return not local.is_dir() and (path.endswith(SUFFIXES) or path.startswith((".", "/", "~")) or local.exists())


def read_rows(
    path: str, config: str | None = None, split: str = "train", revision: str | None = None
) -> tuple[list[Row], list[RejectedRow]]:
    """Every row of a file, a folder or a Hub dataset in its order, and the lines that are no row.

    config, split, revision: of a dataset. What is not cached is downloaded.

    Raises: LLMCompressError for a file that is missing, of another kind, not UTF-8 or no JSON list, and for a dataset
    that is unknown, private, or cannot be reached and is not cached.
    """
    if not is_file(path):
        name, table = _load_dataset(path, config, split, revision)
        return [Row(f"{name} {split}[{index}]", dict(row)) for index, row in enumerate(table)], []
    file = Path(path).expanduser()
    if not file.is_file():
        raise LLMCompressError(f"{path}: no such file", f"give {ACCEPTED}")
    if file.suffix not in SUFFIXES:
        raise LLMCompressError(f"{path}: text is read from {', '.join(SUFFIXES)}, not {file.suffix or 'such a file'}")
    if file.suffix == ".parquet":
        return [Row(f"{path}[{index}]", row) for index, row in enumerate(_read_parquet(file))], []
    read = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv_rows, ".txt": _paragraphs}[file.suffix]
    rows: list[Row] = []
    rejected: list[RejectedRow] = []
    for row in read(path, _read_utf8(file)):
        if isinstance(row, Row):
            rows.append(row)
        else:
            rejected.append(row)
    return rows, rejected


def require_sha256(path: Path, stated: str) -> None:
    """Raises: LLMCompressError for a file that is missing or whose bytes do not have the `stated` sha256."""
    try:
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})", "check the path") from error
    if actual != stated:
        raise LLMCompressError(f"{path}: sha256 is {actual}, {stated} was stated", "the file has changed: restore it")


def pick(rows: Sequence[Row], rejected: Sequence[RejectedRow], field: str) -> list[Document]:
    """One field of every row.

    Raises: LLMCompressError for each line that is no row and each row without the field.
    """
    problems = [LLMCompressError(f"{row.where}: {row.reason}", "every row is one object") for row in rejected]
    for row in rows:
        if field not in row.fields:
            present = ", ".join(sorted(row.fields)) or "none"
            hint = "name the right one as `field`"
            problems.append(LLMCompressError(f"{row.where}: no field {field!r}; fields present: {present}", hint))
    raise_some(problems)
    return [Document(row.where, row.fields[field], row.fields.get("tools")) for row in rows]


def read_text(path: Path, field: str) -> str:
    """The text of a .txt file as it is, or one field of every row of another file, an empty line between two.

    Raises: LLMCompressError as `read_rows` and `pick`, for a row whose field is no text, and for a file without text.
    """
    if path.suffix == ".txt":
        text = _read_utf8(path)
        if not text.strip():
            raise LLMCompressError(f"{path}: no text in it", "give a file with text")
        return text
    documents = pick(*read_rows(str(path)), field)
    if not documents:
        raise LLMCompressError(f"{path}: no text in it", "give a file with text")
    return "\n\n".join(texts(documents))


def texts(documents: Sequence[Document]) -> list[str]:
    """Each document as a text; blank ones are left out.

    Raises: LLMCompressError for each document that is not a text, and when nothing but blanks is left.
    """
    problems = []
    for document in documents:
        if is_text(document.content):
            continue
        if isinstance(document.content, str):
            problems.append(LLMCompressError(f"{document.where}: holds half a surrogate pair, which is no character"))
            continue
        kind = type(document.content).__name__
        hint = "for conversations set `chat_template: true` in the YAML of the calibration set"
        text = f"{document.where}: a {kind} where text is expected"
        problems.append(LLMCompressError(text, hint if kind == "list" else None))
    raise_some(problems)
    kept = [str(document.content) for document in documents if str(document.content).strip()]
    if not kept:
        raise LLMCompressError(f"{documents[0].where}: this document and all after it are blank", "give some text")
    return kept


def is_text(value: object) -> bool:
    """Whether `value` is a string that UTF-8 can hold (JSON's \\u escapes can spell half a surrogate pair)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def raise_some(problems: Sequence[LLMCompressError]) -> None:
    """Raise the problems of one file together, the first ten in full and the rest as a count; nothing for none.

    Raises: LLMCompressError.
    """
    left_out = len(problems) - MOST_SHOWN
    count = [LLMCompressError(f"and {left_out} more problems like these")] if left_out > 0 else []
    raise_all([*problems[:MOST_SHOWN], *count])


def digest_files(*paths: str | None) -> str:
    """sha256 over the bytes of the files, and of the files in the folders, that `paths` name; Hub datasets and None are
    left out, for which a revision speaks.

    Raises: LLMCompressError for a file that is missing.
    """
    sha = hashlib.sha256()
    for path in filter(None, paths):
        local = Path(path).expanduser()
        if is_file(path) and not local.is_file():
            raise LLMCompressError(f"data: {path}: no such file", f"give {ACCEPTED}")
        files = sorted(file for file in local.rglob("*") if file.is_file()) if local.is_dir() else [local]
        for file in files if is_file(path) or local.is_dir() else ():
            sha.update(file.read_bytes())
    return sha.hexdigest()


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})", "check the path") from error
    except UnicodeDecodeError as error:
        raise LLMCompressError(f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8") from error


def _json_lines(path: str, text: str) -> Iterator[Row | RejectedRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            yield RejectedRow(where, "not JSON")
            continue
        yield _as_row(where, value)


def _json_list(path: str, text: str) -> Iterator[Row | RejectedRow]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LLMCompressError(f"{path}: not JSON ({error})", "a .json file is one list of objects") from error
    if not isinstance(values, list):
        raise LLMCompressError(f"{path}: a {type(values).__name__}, not a list", "a .json file is one list of objects")
    for index, value in enumerate(values):
        yield _as_row(f"{path}[{index}]", value)


def _as_row(where: str, value: object) -> Row | RejectedRow:
    return Row(where, value) if isinstance(value, dict) else RejectedRow(where, "not an object")


def _csv_rows(path: str, text: str) -> Iterator[Row | RejectedRow]:
    """Rows of a table with a header; a cell may hold line ends between quotes, so a row is named by its first line."""
    table = csv.reader(io.StringIO(text, newline=""))
    header: list[str] = []
    line = 1
    try:
        for cells in table:
            where, line = f"{path}:{line}", table.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header) or not all(header):
                    raise LLMCompressError(f"{where}: the header has a name twice or none ({', '.join(header)})")
            elif len(cells) != len(header):
                yield RejectedRow(where, f"not as many cells as the header ({len(header)})")
            else:
                yield Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise LLMCompressError(f"{path}:{line}: not CSV ({error})", "save it as .jsonl or .parquet") from error


def _paragraphs(path: str, text: str) -> Iterator[Row]:
    line = 1
    for piece in re.split(r"(\n(?:[^\S\n]*\n)+)", text):
        if piece.strip():
            yield Row(f"{path}:{line}", {"text": piece.strip("\n")})
        line += piece.count("\n")


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            return [dict(row) for row in table]
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            raise LLMCompressError(f"{path}: cannot be read as Parquet ({first})", "check the file") from error


def _load_dataset(path: str, config: str | None, split: str, revision: str | None) -> tuple[str, Any]:
    """What the dataset is called in messages, and its table."""
    import datasets
    from datasets.exceptions import DatasetsError

    name = f"dataset {path}" + (f" ({config})" if config else "") + (f" at {revision}" if revision else "")
    try:
        return name, datasets.load_dataset(str(Path(path).expanduser()), config, split=split, revision=revision)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LLMCompressError(
            f"{name}: split {split!r} cannot be loaded ({first})",
            f"check the name, the split and the network (HF_HUB_OFFLINE unset), or use a local file "
            f"({', '.join(SUFFIXES)})",
        ) from error
