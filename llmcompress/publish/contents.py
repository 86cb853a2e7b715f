"""What a push carries: the files of an output folder as strangers may see them.

weights, config, tokenizer …      as they are
README.md                         with the repository's own name in place of USER/NAME
llmcompress/report.json, recipe   without the paths of this machine
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from llmcompress.card.metadata import eval_results
from llmcompress.card.public import public
from llmcompress.card.view import placeholder
from llmcompress.errors import LLMCompressError
from llmcompress.report import FILE, FOLDER, RunReport

CARD = "README.md"
TEXT_BYTES = 5_000_000
NOT_TEXT = (".safetensors", ".png", ".model", ".bin")


@dataclass(frozen=True, slots=True)
class File:
    """One file to push: its name in the repository, and a path or the very bytes."""

    name: str
    source: Path | bytes

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def content(self) -> bytes:
        """All of it."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def is_text(self) -> bool:
        """Whether it is small enough, and not of a kind that holds no text."""
        return not self.name.endswith(NOT_TEXT) and self.num_bytes <= TEXT_BYTES


def contents(folder: Path, report: RunReport, repo_id: str) -> list[File]:
    """The files that a push of `folder` to `repo_id` carries, in the order of their names.

    Raises: LLMCompressError for a link that leads out of the folder.
    """
    seen = public(report)
    rewritten = {
        f"{FOLDER}/{FILE}": (seen.model_dump_json(indent=1) + "\n").encode(),
        f"{FOLDER}/recipe.yaml": yaml.safe_dump(seen.recipe, sort_keys=False, allow_unicode=True, width=120).encode(),
    }
    card = folder / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        rewritten[CARD] = text.replace(placeholder(seen), repo_id).encode()
    rewritten |= {name: text.encode() for name, text in eval_results(report).items()}
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    kept = {name: path for name, path in found.items() if not _hidden(name) and not name.endswith(".tmp")}
    for name, path in kept.items():
        if not path.resolve().is_relative_to(folder.resolve()):
            raise LLMCompressError(
                f"{folder / name}: is a link that leads out of the folder", "put the file itself there"
            )
    sources: dict[str, Path | bytes] = {**kept, **rewritten}
    return [File(name, sources[name]) for name in sorted(sources)]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
