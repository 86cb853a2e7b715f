"""Where text comes from: plain files and JSON lines, read whole and judged whole.

    .txt     documents are separated by blank lines; a file without any is one document
    .jsonl   one JSON object per line; its `field` is the document (a text, or the messages of a conversation)

Every document keeps the place it came from, so that what is wrong with it can be said as `file:line`. All problems of a
file are found in one pass; blank documents are passed over.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcompress.errors import LLMCompressError, raise_all

SUFFIXES = (".txt", ".jsonl")
MOST_SHOWN = 10
"""Of one file's problems this many are shown, then a count of the rest."""


@dataclass(frozen=True)
class Document:
    """A piece of data and its place: `file:line`, or the row of a dataset. Its type is not judged yet."""

    where: str
    content: object


def read_documents(path: Path, field: str, sha256: str | None = None) -> list[Document]:
    """The documents of a .txt or .jsonl file, in file order; `field` is read from each line of a .jsonl.

    Raises: LLMCompressError for a file that is missing, not UTF-8, empty, or whose bytes do not have the given
    `sha256`; and one for each malformed line and each line without the field.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})", "check the path") from error
    found = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and found != sha256:
        raise LLMCompressError(f"{path}: sha256 is {found}, {sha256} was stated", "the file has changed: restore it")
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise LLMCompressError(f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8") from error
    documents = _json_lines(path, text, field) if path.suffix == ".jsonl" else _paragraphs(path, text)
    if not documents:
        raise LLMCompressError(f"{path}: no text in it", "give a file with text to calibrate on")
    return documents


def texts(documents: Sequence[Document]) -> list[str]:
    """Each document as a text; blank ones are left out.

    Raises: LLMCompressError for each document that is not a text, and when nothing but blanks is left.
    """
    problems = [problem for document in documents if (problem := _not_a_text(document))]
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


def _paragraphs(path: Path, text: str) -> list[Document]:
    documents, line = [], 1
    for piece in re.split(r"(\n(?:[^\S\n]*\n)+)", text):
        if piece.strip():
            documents.append(Document(f"{path}:{line}", piece.strip("\n")))
        line += piece.count("\n")
    return documents


def _json_lines(path: Path, text: str, field: str) -> list[Document]:
    documents: list[Document] = []
    problems: list[LLMCompressError] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                documents.append(_json_line(f"{path}:{number}", line, field))
            except LLMCompressError as problem:
                problems.append(problem)
    raise_some(problems)
    return documents


def _json_line(where: str, line: str, field: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LLMCompressError(f"{where}: not JSON ({error})", "each line of a .jsonl is one JSON object") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise LLMCompressError(f"{where}: a {kind}, not an object", "each line of a .jsonl is one JSON object")
    if field not in record:
        present = ", ".join(sorted(record)) or "none"
        raise LLMCompressError(
            f"{where}: no field {field!r}; fields present: {present}",
            "name the right one as `field` in the YAML of the calibration set",
        )
    return Document(where, record[field])


def _not_a_text(document: Document) -> LLMCompressError | None:
    if is_text(document.content):
        return None
    if isinstance(document.content, str):
        return LLMCompressError(f"{document.where}: holds half a surrogate pair, which is no character")
    kind = type(document.content).__name__
    hint = "for conversations set `chat_template: true` in the YAML of the calibration set"
    return LLMCompressError(f"{document.where}: a {kind} where text is expected", hint if kind == "list" else None)
