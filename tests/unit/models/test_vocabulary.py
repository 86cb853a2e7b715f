"""Ids and rows: an id without a row is one line; models that differ in padding are compared over what they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.checkpoint.tokenizer import load_tokenizer
from llmcompress.errors import LLMCompressError
from llmcompress.models.loading import load_model
from llmcompress.models.vocabulary import (
    VocabularySide,
    guard_embedding,
    need_rows,
    num_embeddings,
    shared_vocabulary,
    tokenizer_place,
)
from tests import tiny_models

TOKENS = {f"t{i}": i for i in range(151665)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of 96 rows whose tokenizer has learned a 97th token since."""
    path = tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(path)
    tokenizer = load_tokenizer(path)
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    tokenizer.save_pretrained(path)
    return path


def test_an_id_without_a_row_names_token_id_rows_and_file(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("w3 <|user|> w4")["input_ids"]
    place = tokenizer_place(folder)
    with pytest.raises(LLMCompressError) as caught:
        need_rows(ids, 96, tokenizer, place)
    assert caught.value.message == (
        f"{folder / 'tokenizer.json'}: token '<|user|>' has id 96, and the model embeds 96 rows"
    )
    need_rows(ids, 97, tokenizer, place)
    need_rows(torch.tensor([ids]) - 1, 96, tokenizer, place)


@pytest.mark.parametrize("ids", [[], torch.empty(0, 3, dtype=torch.long), [[0][0]], torch.tensor([[95]])])
def test_ids_with_rows_pass(ids: list[int] | torch.Tensor, folder: Path) -> None:
    need_rows(ids, 96, load_tokenizer(folder), "here")


def test_a_negative_id_has_no_row(folder: Path) -> None:
    with pytest.raises(LLMCompressError, match="token None has id -100"):
        need_rows(torch.tensor([3, -100]), 96, load_tokenizer(folder), "here")


def test_a_guarded_model_says_so_before_it_indexes(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert num_embeddings(model) == 96
    before = model(torch.tensor([[3, 4]], device=model.device)).logits
    guard_embedding(model, tokenizer, "requests")
    assert model(torch.tensor([[3, 4]], device=model.device)).logits.equal(before)
    with pytest.raises(LLMCompressError, match=r"requests: token '<\|user\|>' has id 96"):
        model(torch.tensor([[3, 96]]))


def side(name: str, num_rows: int, tokens: dict[str, int] = TOKENS) -> VocabularySide:
    return VocabularySide(name, tokens, num_rows)


def test_equal_vocabularies_are_compared_whole() -> None:
    shared = shared_vocabulary(side("a", 151936), side("b", 151936))
    assert (shared.size, shared.note) == (151936, None)


@pytest.mark.parametrize("rows", [(152064, 151936), (151936, 152064)])
def test_padding_rows_are_cut_and_said(rows: tuple[int, int]) -> None:
    shared = shared_vocabulary(side("a", rows[0]), side("b", rows[1]))
    assert shared.size == 151936
    assert shared.note is not None and "128 rows" in shared.note and f"{rows[0]} and {rows[1]}" in shared.note


def test_different_tokenizers_are_refused_with_both_sizes() -> None:
    other = {token: i + 1 for token, i in list(TOKENS.items())[:1000]}
    with pytest.raises(LLMCompressError, match=r"151665 tokens against 1000, 151665 differ \('t0' first\)"):
        shared_vocabulary(side("a", 151936), side("b", 1024, other))


def test_a_token_without_a_row_of_logits() -> None:
    with pytest.raises(LLMCompressError, match="b: has 100 rows"):
        shared_vocabulary(side("a", 151936), side("b", 100))
