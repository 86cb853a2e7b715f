"""Ids and rows: an id without a row is one line; models that differ in padding are compared over what they share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.models import meta
from llmcompress.models.loading import load_model
from llmcompress.models.vocabulary import (
    VocabularySide,
    check_ids,
    guard_embedding,
    need_rows,
    num_embeddings,
    shared_vocabulary,
    tokenizer_place,
)
from llmcompress.pipeline.run import run
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


def test_a_model_finds_its_own_tokenizer_to_name_the_token(folder: Path) -> None:
    model = meta.build(Checkpoint.open(folder))
    check_ids(torch.tensor([[3, 95]]), model)
    with pytest.raises(LLMCompressError, match=r"model/tokenizer\.json: token '<\|user\|>' has id 96, and the model"):
        check_ids([3, 96], model)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(LLMCompressError, match=r"model: token None has id 96"):
        check_ids([3, 96], model)


@pytest.mark.parametrize("stage", ["quantize", "finetune"])
def test_a_chat_template_that_writes_such_a_token_is_one_line(stage: str, folder: Path, tmp_path: Path) -> None:
    """tokenizers#1609: tokens were added, the embedding was not resized, the template writes them."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ ' ' + m.content + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    rows = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": tiny_models.words(40)}, {"role": "assistant", "content": "w3 w4"}]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
    declared = tmp_path / "chat.yaml"
    declared.write_text(f"name: chat\ntext: {rows}\nfield: messages\n")
    settings: dict[str, Any] = {"calibration": str(declared), "num_samples": 2, "seq_len": 16, "group_size": 32}
    if stage == "finetune":
        settings = {"adapter": "lora", "data": {"path": str(rows), "seq_len": 64}, "training": {"max_steps": 1}}
    recipe = Recipe.of({"model": str(folder), "output": str(tmp_path / "out"), "stages": [{stage: settings}]})
    with pytest.raises(
        LLMCompressError, match=r"tokenizer\.json: token '<\|user\|>' has id 96, and the model embeds 96"
    ):
        run(recipe, Silent())
    assert not (tmp_path / "out").exists()
