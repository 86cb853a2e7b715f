"""A tokenizer.json as the fields that llama.cpp tokenizes by.

Two kinds are known. Byte-level BPE (`gpt2`): tokens, merges, and the name of the pre-tokenizer in llama.cpp's own
list; here it is told from the regular expressions in tokenizer.json, so a vocabulary that was trained anew or extended
is known too. SentencePiece-like BPE with byte fallback (`llama`): llama.cpp merges the pair whose token has the highest
score, so a token's score is minus the rank of its merge, which gives the same order.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.files import read_json
from llmcompress.errors import LLMCompressError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    f"{_WORDS}|\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORDS}|\\p{{N}}{_REST}": "qwen2",
}
"""Regular expression of a Split pre-tokenizer before ByteLevel -> llama.cpp's name."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What the file says of a tokenizer. model: `gpt2` or `llama`. tokens, types, scores: by id, one per embedding."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool | None = None


def read_tokenizer(folder: Path, num_rows: int) -> GgufTokenizer:
    """The tokenizer of a checkpoint folder; `num_rows` of its embedding, the ids without a token being unused ones.

    Raises: LLMCompressError for a tokenizer without tokenizer.json, of another kind, or with a pre-tokenizer that
    llama.cpp has no name for.
    """
    path = folder / "tokenizer.json"
    try:
        data = read_json(path)
        model, added = data["model"], data.get("added_tokens") or []
        vocabulary: dict[str, int] = dict(model["vocab"])
    except (LLMCompressError, ValueError, KeyError, TypeError) as error:
        raise LLMCompressError(
            f"{path}: no fast tokenizer to be read from it ({type(error).__name__})",
            "a GGUF file carries its tokenizer: save it with a fast one (tokenizer.save_pretrained)",
        ) from error
    if model.get("type") != "BPE":
        raise LLMCompressError(
            f"{path}: its model is {model.get('type')!r}; GGUF export knows BPE, byte-level or with byte fallback"
        )
    merges = [merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge)
              for merge in model.get("merges") or []]  # fmt: skip
    types = {token["content"]: CONTROL if token.get("special") else USER_DEFINED for token in added}
    vocabulary |= {token["content"]: token["id"] for token in added}
    tokens, kinds = [f"[PAD{index}]" for index in range(num_rows)], [UNUSED] * num_rows
    for text, index in vocabulary.items():
        if index >= num_rows:
            raise LLMCompressError(
                f"{path}: token {text!r} has id {index}, the embedding has {num_rows} rows",
                "resize the embedding, or remove the token",
            )
        tokens[index], kinds[index] = text, types.get(text, NORMAL)
    if model.get("byte_fallback"):
        return _sentencepiece(data, merges, vocabulary, tokens, kinds)
    return GgufTokenizer("gpt2", _pre_tokenizer(path, data.get("pre_tokenizer")), tokens, kinds, merges)


def _sentencepiece(
    data: dict[str, Any], merges: list[str], vocabulary: dict[str, int], tokens: list[str], kinds: list[int]
) -> GgufTokenizer:
    scores = [-1e4] * len(tokens)
    for rank, merge in reversed(list(enumerate(merges))):  # the first merge that makes a token is the one that counts
        index = vocabulary.get(merge.replace(" ", ""))
        if index is not None:
            scores[index] = -float(rank)
    for index, text in enumerate(tokens):
        if kinds[index] == NORMAL and _BYTE_TOKEN.fullmatch(text):
            kinds[index] = BYTE
    unknown = vocabulary.get(str(data["model"].get("unk_token")))
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    return GgufTokenizer(
        "llama", "default", tokens, kinds, [], scores, '"Prepend"' in json.dumps(data.get("normalizer"))
    )


def _pre_tokenizer(path: Path, declared: Any) -> str:
    """llama.cpp's name for a pre-tokenizer, told from its parts."""
    parts = (declared or {}).get("pretokenizers") or ([declared] if declared else [])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        name = SPLITS.get((parts[0].get("pattern") or {}).get("Regex", ""))
        if name is not None and parts[0].get("behavior") == "Isolated":
            return name
    shown = " + ".join(map(str, kinds)) or "none"
    raise LLMCompressError(
        f"{path}: its pre-tokenizer ({shown}) splits text by rules that none known here in llama.cpp has",
        "its ids would differ from the checkpoint's; serve the safetensors output by transformers or vLLM instead",
    )
