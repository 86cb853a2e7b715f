"""What a push carries: the files of an output folder that belong to a checkpoint, as strangers may see them.

weights, config                   those of the report, by name
tokenizer, chat template, licence side files of the source, by the names that such files have
README.md                         with the repository's own name in place of USER/NAME
llmcompress/                      report and recipe without the paths of this machine; figures, samples

Whatever else lies there is not carried: it is named, and `include` takes it along by a pattern. A link, a name of git's
and what is no plain file are never carried.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from llmcompress.card.metadata import eval_results
from llmcompress.card.public import public
from llmcompress.card.view import placeholder
from llmcompress.report import FILE, FOLDER, RunReport

CARD = "README.md"
CHUNK_BYTES = 1 << 20
TEXT_BYTES = 5_000_000
NOT_TEXT = (".safetensors", ".png", ".model", ".bin")

ALLOWED = (
    # the model and what loads it
    "config.json", "quantize_config.json", "quant_config.json", "generation_config.json",
    "model.safetensors.index.json", "adapter_config.json",
    # tokenizer, template, processor
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "source.spm", "target.spm", "bpe.codes", "vocab.bpe", "*.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json",
    # sentence embedding
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "1_Pooling/config.json", "2_Normalize/config.json",
    # licence and card
    "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md",
    "NOTICE", "NOTICE.txt", "USE_POLICY.md", CARD,
    # evidence
    f"{FOLDER}/{FILE}", f"{FOLDER}/recipe.yaml", f"{FOLDER}/figures/*.png", f"{FOLDER}/samples/*.jsonl",
)  # fmt: skip
"""Names that files of a checkpoint have, besides the weights that its report lists."""


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

    def chunks(self) -> Iterator[bytes]:
        """All of it, at most CHUNK_BYTES at a time."""
        if isinstance(self.source, bytes):
            yield self.source
            return
        with self.source.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def is_text(self) -> bool:
        """Whether it is small enough, and not of a kind that holds no text."""
        return not self.name.endswith(NOT_TEXT) and self.num_bytes <= TEXT_BYTES


@dataclass(frozen=True, slots=True)
class Contents:
    """The files that go out, in the order of their names; what lies beside them and does not.

    unknown: files that no rule allows. never: name -> why it cannot go out. left: scratch and hidden files, which are
    nobody's loss. unmatched: patterns of `include` that match no file.
    """

    files: list[File]
    unknown: list[str] = field(default_factory=list)
    never: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


def contents(folder: Path, report: RunReport, repo_id: str, include: Sequence[str] = ()) -> Contents:
    """What a push of `folder` to `repo_id` carries; `include`: patterns of further files (`*` crosses folders)."""
    found = Contents([])
    weights = report.output.digests.keys() if report.output else ()
    sources: dict[str, Path | bytes] = {}
    for name, path in sorted(_walk(folder)):
        included = any(fnmatchcase(name, pattern) for pattern in include)
        allowed = name in weights or any(_matches(name, pattern) for pattern in ALLOWED)
        why = _never(name, path)
        if why is not None and (included or allowed or not _hidden(name)):
            found.never[name] = why
        elif allowed or included:
            sources[name] = path
        elif not _hidden(name):
            found.unknown.append(name)
        elif not name.startswith(f"{FOLDER}/."):  # a stage's own bookkeeping is no news
            found.left.append(name)
    found.unmatched.extend(
        pattern for pattern in include if not any(fnmatchcase(name, pattern) for name in [*sources, *found.never])
    )
    seen = public(report)
    sources |= {
        f"{FOLDER}/{FILE}": (seen.model_dump_json(indent=1) + "\n").encode(),
        f"{FOLDER}/recipe.yaml": yaml.safe_dump(seen.recipe, sort_keys=False, allow_unicode=True, width=120).encode(),
    }
    if CARD in sources:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        sources[CARD] = text.replace(placeholder(seen), repo_id).encode()
    sources |= {name: text.encode() for name, text in eval_results(report).items()}
    found.files.extend(File(name, sources[name]) for name in sorted(sources))
    return found


def grouped(names: Iterable[str]) -> list[str]:
    """Names, those of one folder together.

    >>> grouped(["a", "b/c", "b/d/e"])
    ['a', 'b/ (2 files)']
    """
    counts: dict[str, int] = {}
    for name in names:
        top = name.partition("/")[0] + "/" if "/" in name else name
        counts[top] = counts.get(top, 0) + 1
    return [
        f"{top} ({number} file{'s' if number > 1 else ''})" if top.endswith("/") else top
        for top, number in counts.items()
    ]


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder, and every link, which is not followed: its name and its path."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in [*files, *links]:
            path = Path(place) / name
            yield path.relative_to(folder).as_posix(), path


def _never(name: str, path: Path) -> str | None:
    """Why a file cannot go out, whoever asks for it; None where it can."""
    if path.is_symlink():
        return "is a link; put the file itself there"
    if not stat.S_ISREG(path.stat().st_mode):
        return "is no plain file"
    if any(part.lower() in (".git", ".gitmodules") for part in name.split("/")):
        return "is a name of git's own"
    if re.search(r"[\x00-\x1f\x7f\\]", name) or not name.isprintable():
        return "has a name with letters that a repository does not take"
    return None


def _matches(name: str, pattern: str) -> bool:
    """Whether a name is that of a pattern, whose `*` stays within one folder."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _hidden(name: str) -> bool:
    return name.endswith(".tmp") or any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
