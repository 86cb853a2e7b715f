"""The one place that talks to `datasets`: a column of a Hub dataset (or of a local folder of data files)."""

from __future__ import annotations

from llmcompress.data.documents import Document
from llmcompress.errors import LLMCompressError


def read_dataset(path: str, name: str | None, split: str, revision: str | None, field: str) -> list[Document]:
    """The column `field` of a split, in the dataset's order; downloads what is not cached.

    `path` is a Hub dataset id or a folder, `name` one of its configurations, `revision` a commit, tag or branch.

    Raises: LLMCompressError when it is unknown, private, empty, or cannot be reached and is not cached, and when it
    has no such configuration, split or column.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    shown = f"dataset {path}" + (f" ({name})" if name else "") + (f" at {revision}" if revision else "")
    try:
        table = datasets.load_dataset(path, name, split=split, revision=revision)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LLMCompressError(
            f"{shown}: split {split!r} cannot be loaded ({first})",
            "check the name, the split and the network (HF_HUB_OFFLINE unset), or use a local .txt or .jsonl file",
        ) from error
    if field not in table.column_names:
        present = ", ".join(sorted(table.column_names)) or "none"
        raise LLMCompressError(f"{shown}: no column {field!r}; columns present: {present}", "name the right `field`")
    if not len(table):
        raise LLMCompressError(f"{shown}: split {split!r} is empty", "choose another split")
    return [Document(f"{shown} {split}[{row}]", content) for row, content in enumerate(table[field])]
