"""What lies beside the weights of a source: its tokenizer, the small files that travel along, and its model card."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.checkpoint.files import refuse_outside
from llmcompress.config.yaml_lines import parse_yaml
from llmcompress.console import quiet
from llmcompress.errors import LLMCompressError, third_party

if TYPE_CHECKING:
    from llmcompress.checkpoint.reader import Checkpoint

NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf", ".md", ".png", ".jpg")
REWRITTEN = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "quantize_config.json")
CARD_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
MAX_CARD_BYTES = 4 << 20
MAX_FRONT_MATTER_BYTES = 64 << 10
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")


def load_tokenizer(source: Checkpoint | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint or of a folder, as transformers loads it; nothing is fetched.

    trust_remote_code: of a folder; a checkpoint has its own.

    Raises: LLMCompressError when the folder has none that transformers can load, naming the package that it lacks.
    """
    from transformers import AutoTokenizer

    folder, name = (source, str(source)) if isinstance(source, Path) else (source.folder, source.name)
    trust = trust_remote_code if isinstance(source, Path) else source.trust_remote_code
    missing = [module for module in ("sentencepiece", "google.protobuf") if not _installed(module)]
    pieces = next((each for each in SENTENCEPIECE if (folder / each).is_file()), None)
    if missing and pieces and not (folder / "tokenizer.json").is_file():
        raise LLMCompressError(
            f"{name}: its tokenizer is a SentencePiece file ({pieces}, no tokenizer.json), "
            f"and {' and '.join(missing)} cannot be imported",
            "pip install sentencepiece protobuf",
        )
    hint = "calibration and evaluation need tokenizer files beside config.json; --method rtn does not"
    with third_party(f"{name}: its tokenizer cannot be loaded", hint), quiet("transformers"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def side_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are copied as they are: tokenizer, chat template, generation config, code.

    Raises: LLMCompressError for one that is a link out of the folder.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(NOT_COPIED)
        and path.name not in REWRITTEN
    )
    refuse_outside(folder, files)
    return files


def source_metadata(folder: Path) -> dict[str, Any]:
    """license, license_name, license_link, languages and pipeline_tag from README.md's front matter, where stated.

    Read as the Hub reads them, never invented: one license may stand in a list, several make `other` with their names,
    and `language: no` is Norwegian. What is not readable is left out.
    """
    front = front_matter(folder / "README.md")
    licences = [each for each in _listed(front.get("license")) if isinstance(each, str)]
    found = {
        "license": licences[0] if len(licences) == 1 else "other" if licences else None,
        "license_name": front.get("license_name") or (", ".join(licences) if len(licences) > 1 else None),
        "license_link": front.get("license_link"),
        "languages": [each for each in _listed(front.get("language")) if isinstance(each, str)],
        "pipeline_tag": front.get("pipeline_tag"),
    }
    return {key: value for key, value in found.items() if isinstance(value, (str, list)) and value}


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in `folder` says how a chat is laid out."""
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and b'"chat_template"' in config.read_bytes()


def front_matter(card: Path) -> dict[str, Any]:
    """The values of `CARD_KEYS` in the YAML between the first two `---` lines of a model card; empty without any.

    Only the lines of these keys are parsed: a card of an embedding model carries half a megabyte of results there.
    """
    if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return {}
    lines = card.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    chosen: list[str] = []
    keep = False
    for line in lines[1:]:
        if line.rstrip() in ("---", "..."):
            break
        if key := re.match(r"""["']?([A-Za-z_][\w-]*)["']?\s*:(\s|$)""", line):
            keep = key[1] in CARD_KEYS
        if keep:
            chosen.append(line)
    else:
        return {}
    text = "\n".join(chosen)
    if len(text) > MAX_FRONT_MATTER_BYTES:
        return {}
    try:
        front = parse_yaml(text, str(card))
    except LLMCompressError:
        return {}
    return front if isinstance(front, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
