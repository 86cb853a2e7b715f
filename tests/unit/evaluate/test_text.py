from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.text import compare_rows, read_text, rows_at_once, shared_entries, token_rows


class Table:
    """A model whose logits depend on the present token alone: row t of a table."""

    def __init__(self, logits_VV: torch.Tensor) -> None:
        self.logits_VV = logits_VV
        self.device = logits_VV.device
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.seen.append(input_ids)
        return SimpleNamespace(logits=self.logits_VV[input_ids])


class Words:
    """A tokenizer of numbers as words, with or without a beginning-of-sequence token 0."""

    def __init__(self, bos: bool) -> None:
        self.bos_token_id = 0 if bos else None
        self.starts = [0] if bos else []

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        words = [int(word) if word.isdigit() else 1 for word in text.split()]
        return {"input_ids": (self.starts if add_special_tokens else []) + words}


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk_bytes", [32 << 20, 8 * 11 * 3])
def test_figures_equal_a_float64_formula(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.evaluate.text.CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    base = 3 * torch.randn(11, 11, generator=generator)
    comp = base + 0.3 * torch.randn(11, 11, generator=generator)
    tokens = torch.randint(0, 11, (5, 9), generator=generator)
    stats = compare_rows(Table(base), Table(comp), tokens, batch_size=2)
    p, q = softmax(base.double().numpy()), softmax(comp.double().numpy())
    for row, ids in enumerate(tokens.numpy()):
        now, after = ids[:-1], ids[1:]
        assert stats.baseline_nll_N[row] == pytest.approx(-np.log(p[now, after]).mean(), rel=1e-12)
        assert stats.compressed_nll_N[row] == pytest.approx(-np.log(q[now, after]).mean(), rel=1e-12)
        kl = (p * np.log(p / q)).sum(-1)
        assert stats.kl_N[row] == pytest.approx(kl[now].mean(), rel=1e-10)
        assert stats.agreement_N[row] == (p.argmax(-1) == q.argmax(-1))[now].mean()
    assert stats.tokens_per_row == 8


def test_padding_rows_are_left_out_of_both_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    base, comp = torch.randn(7, 7, generator=generator), torch.randn(7, 7, generator=generator)
    wide = torch.nn.functional.pad(comp, (0, 3), value=5.0)
    tokens = torch.arange(14).reshape(2, 7) % 7
    plain = compare_rows(Table(base), Table(comp), tokens, batch_size=2)
    padded = compare_rows(Table(base), Table(wide), tokens, batch_size=2, entries=7)
    assert (padded.kl_N == plain.kl_N).all() and (padded.compressed_nll_N == plain.compressed_nll_N).all()
    with pytest.raises(LLMCompressError, match="7 entries and 10"):
        compare_rows(Table(base), Table(wide), tokens, batch_size=2)


def test_which_entries_two_models_share() -> None:
    tokens = {"a": 0, "b": 1, "c": 2}
    assert shared_entries((4, 4), (tokens, {})) is None
    assert shared_entries((4, 6), (tokens, dict(tokens))) == shared_entries((6, 4), (tokens, dict(tokens))) == 4
    for widths, other in (((4, 6), {"a": 0}), ((2, 6), dict(tokens))):
        with pytest.raises(LLMCompressError, match=f"{widths[0]} entries and {widths[1]}, for 3 tokens"):
            shared_entries(widths, (tokens, other))


def test_a_model_and_itself_do_not_differ() -> None:
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    stats = compare_rows(Table(table), Table(table.clone()), torch.arange(14).reshape(2, 7) % 7, batch_size=8)
    assert (stats.kl_N == 0).all()
    assert (stats.agreement_N == 1).all()
    assert (stats.baseline_nll_N == stats.compressed_nll_N).all()


def test_both_models_see_the_same_batches_and_every_row_once() -> None:
    models = Table(torch.zeros(4, 4)), Table(torch.ones(4, 4))
    tokens = torch.arange(5 * 6).reshape(5, 6) % 4
    done: list[int] = []
    compare_rows(*models, tokens, batch_size=2, on_rows=done.append)
    assert done == [2, 2, 1]
    assert torch.equal(torch.cat(models[0].seen), tokens)
    assert all(torch.equal(left, right) for left, right in zip(models[0].seen, models[1].seen, strict=True))


def test_a_broken_model_is_named_with_its_row() -> None:
    good, bad = torch.zeros(3, 3), torch.zeros(3, 3)
    bad[2] = float("nan")
    tokens = torch.tensor([[0, 1, 0], [0, 2, 1]])
    with pytest.raises(LLMCompressError, match="row 1: the compressed model gives logits that are not finite"):
        compare_rows(Table(good), Table(bad), tokens, batch_size=2)
    with pytest.raises(LLMCompressError, match="row 1: the baseline"):
        compare_rows(Table(bad), Table(good), tokens, batch_size=1)
    with pytest.raises(LLMCompressError, match="3 entries and 4"):
        compare_rows(Table(good), Table(torch.zeros(3, 4)), tokens, batch_size=1)


def test_rows_are_full_and_start_as_the_tokenizer_starts_text() -> None:
    text = " ".join(str(number) for number in range(1, 12))
    assert token_rows(text, Words(bos=False), 4, 100, "t").tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert token_rows(text, Words(bos=True), 4, 100, "t").tolist() == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]
    assert token_rows(text, Words(bos=True), 4, 7, "t").tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]


def test_a_text_of_one_row_is_refused() -> None:
    with pytest.raises(LLMCompressError, match=r"suite: text t: 5 tokens fill 1 rows of seq_len 4"):
        token_rows("1 2 3 4 5", Words(bos=False), 4, 100, "suite: text t")


def test_jsonl_is_joined_and_its_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([json.dumps({"story": "one"}), "", json.dumps({"story": "two"})]), encoding="utf-8")
    assert read_text(path, "story") == "one\n\ntwo"
    with pytest.raises(LLMCompressError, match=r"t\.jsonl:1: has no text in field 'text' \(it has: story\)"):
        read_text(path, "text")
    path.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(LLMCompressError, match=r"t\.jsonl:2: not valid JSON"):
        read_text(path, "text")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_text_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("t.txt", "t.jsonl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LLMCompressError, match="holds no text"):
            read_text(tmp_path / name, "text")
    (tmp_path / "t.txt").write_bytes(b"ab\xff")
    with pytest.raises(LLMCompressError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(tmp_path / "t.txt", "text")


def test_batches_shrink_where_logits_would_not_fit() -> None:
    assert rows_at_once(16, 256, 2048) == 16
    assert rows_at_once(16, 2048, 10_000) == 6
    assert rows_at_once(16, 8192, 256_000) == 1
