"""A tokenizer as llama.cpp's fields: ids keep their places, kinds are told, what is not known is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import LLMCompressError
from llmcompress.formats.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_tokenizer
from llmcompress.resources import bundled_checkpoint

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def save(folder: Path, **changes: Any) -> Path:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]} | changes.pop("model", {})
    data = {"model": model, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True}, "added_tokens": []} | changes
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_ids_and_types_are_those_of_the_bundled_tokenizer() -> None:
    from transformers import AutoTokenizer

    folder = bundled_checkpoint("bundled/tiny")
    assert folder is not None
    found, theirs = read_tokenizer(folder, 1030), AutoTokenizer.from_pretrained(folder)
    assert found.model == "gpt2" and found.pre == "gpt-2" and len(found.tokens) == 1030
    assert all(found.tokens[index] == text for text, index in theirs.get_vocab().items())
    assert found.tokens[1029] == "[PAD1029]" and found.types[1029] == UNUSED
    assert {found.types[index] for index in theirs.all_special_ids} == {CONTROL}


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        ({"type": "ByteLevel"}, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}],
            },
            "smollm",
        ),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated"},
                    {"type": "ByteLevel", "use_regex": False},
                ],
            },
            "llama-bpe",
        ),
    ],
)
def test_a_pre_tokenizer_is_told_from_its_parts(pre: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert read_tokenizer(save(tmp_path, pre_tokenizer=pre), 3).pre == name


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": r"\w+"}}, {"type": "ByteLevel", "use_regex": False}]}},
        {"model": {"type": "Unigram"}},
        {"added_tokens": [{"content": "<x>", "id": 7, "special": True}]},
    ],
)  # fmt: skip
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match=r"tokenizer\.json"):
        read_tokenizer(save(tmp_path, **changes), 3)


def test_scores_give_merges_their_order(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0x41>": 1, "a": 2, "b": 3, "ab": 4, "aab": 5}
    model = {"vocab": vocabulary, "merges": ["a b", "a ab"], "byte_fallback": True, "unk_token": "<unk>"}
    added = [{"content": "<unk>", "id": 0, "special": True}, {"content": "<tool>", "id": 6, "special": False}]
    found = read_tokenizer(save(tmp_path, model=model, added_tokens=added), 7)
    assert found.model == "llama" and found.scores[4] > found.scores[5] > found.scores[2]
    assert found.types == [UNKNOWN, BYTE, NORMAL, NORMAL, NORMAL, NORMAL, USER_DEFINED]


def test_a_folder_without_a_fast_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path, 3)
