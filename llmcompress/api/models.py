"""What a verb takes for a model: a folder, a Hub id, an `Artifact`, a `Checkpoint`, or a model that is loaded.

A loaded model is saved with its tokenizer to a temporary folder, which is what the verb then works on, one block in
memory at a time as with any checkpoint; the model itself is not touched. Reports name it by its `name_or_path`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.api.results import Artifact
from llmcompress.console import quiet
from llmcompress.errors import LLMCompressError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.checkpoint.reader import Checkpoint

    Model = str | PathLike[str] | Artifact | Checkpoint | PreTrainedModel


@dataclass(frozen=True, slots=True)
class Named:
    """A model as a recipe names it. alias: what reports are to call it, where `name` is a folder that will be gone."""

    name: str
    revision: str | None = None
    alias: str | None = None


@contextmanager
def named(model: Model, tokenizer: Any = None) -> Iterator[Named]:
    """`model` under a name that a recipe can hold, for the length of a with block.

    Raises: LLMCompressError for what is no model, and for a loaded one whose tokenizer is not found.
    """
    from llmcompress.checkpoint.reader import Checkpoint

    if isinstance(model, Artifact):
        yield Named(str(model.folder))
    elif isinstance(model, str | PathLike):
        yield Named(str(model))
    elif isinstance(model, Checkpoint):
        yield Named(model.hub_id or str(model.folder), model.revision)
    elif hasattr(model, "save_pretrained") and hasattr(model, "config"):
        alias = model.name_or_path or type(model).__name__
        with tempfile.TemporaryDirectory(prefix="llmcompress-model-") as scratch:
            folder = Path(scratch) / (Path(alias).name or "model")
            with quiet("transformers"):
                (tokenizer or _tokenizer_of(model)).save_pretrained(folder)
                model.save_pretrained(folder)
            yield Named(str(folder), alias=alias)
    else:
        raise LLMCompressError(
            f"model: a {type(model).__name__} is none", "give a folder, a Hub id, a Checkpoint or a transformers model"
        )


def _tokenizer_of(model: PreTrainedModel) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    except Exception as error:  # transformers and its packages raise all kinds
        raise LLMCompressError(
            f"model: no tokenizer lies at its name_or_path {model.name_or_path!r}", "pass tokenizer="
        ) from error


def text(value: Any) -> Any:
    """A value of an option as a recipe holds it: paths, artifacts and checkpoints by their names."""
    if isinstance(value, PathLike):
        return str(value.folder) if isinstance(value, Artifact) else str(value)
    if isinstance(value, list | tuple):
        return [text(item) for item in value]
    if isinstance(value, dict):
        return {key: text(item) for key, item in value.items()}
    return value.name if type(value).__name__ == "Checkpoint" else value
