from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.text import compare_rows, read_text, rows_at_once, token_rows
from llmcompress.models.divergence import kl


class Table:
    """A model whose logits depend on the present token alone: row t of a table."""

    def __init__(self, logits_VV: torch.Tensor) -> None:
        self.logits_VV = logits_VV
        self.seen: list[torch.Tensor] = []

    def __call__(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for tokens_BS in batches:
            self.seen.append(tokens_BS)
            yield self.logits_VV[tokens_BS]


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
    monkeypatch.setattr("llmcompress.models.divergence.TABLE_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    base = 3 * torch.randn(11, 11, generator=generator)
    comp = base + 0.3 * torch.randn(11, 11, generator=generator)
    tokens = torch.randint(0, 11, (5, 9), generator=generator)
    figures = compare_rows(Table(base), Table(comp), tokens, batch_size=2)
    perplexity = figures.by_metric["perplexity"]
    assert perplexity.baseline_N is not None and perplexity.compressed_N is not None
    assert (perplexity.pair_N == perplexity.compressed_N - perplexity.baseline_N).all()
    p, q = softmax(base.double().numpy()), softmax(comp.double().numpy())
    for row, ids in enumerate(tokens.numpy()):
        now, after = ids[:-1], ids[1:]
        assert perplexity.baseline_N[row] == pytest.approx(-np.log(p[now, after]).mean(), rel=1e-12)
        assert perplexity.compressed_N[row] == pytest.approx(-np.log(q[now, after]).mean(), rel=1e-12)
        kl = (p * np.log(p / q)).sum(-1)
        assert figures.by_metric["kl"].pair_N[row] == pytest.approx(kl[now].mean(), rel=1e-10)
        assert figures.by_metric["top1_agreement"].pair_N[row] == (p.argmax(-1) == q.argmax(-1))[now].mean()
    assert (figures.tokens_per_row, figures.num_tokens) == (8, 40)


def test_padding_rows_are_left_out_of_both_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    base, comp = torch.randn(7, 7, generator=generator), torch.randn(7, 7, generator=generator)
    wide = torch.nn.functional.pad(comp, (0, 3), value=5.0)
    tokens = torch.arange(14).reshape(2, 7) % 7
    plain = compare_rows(Table(base), Table(comp), tokens, batch_size=2)
    padded = compare_rows(Table(base), Table(wide), tokens, batch_size=2, entries=7)
    for name, row in plain.by_metric.items():
        assert (padded.by_metric[name].pair_N == row.pair_N).all()
    with pytest.raises(LLMCompressError, match="7 entries and 10"):
        compare_rows(Table(base), Table(wide), tokens, batch_size=2)


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
    with pytest.raises(LLMCompressError, match=r"t\.jsonl:1: no field 'text'; fields present: story"):
        read_text(path, "text")
    path.write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(LLMCompressError, match=r"t\.jsonl:2: not JSON"):
        read_text(path, "text")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_text_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("t.txt", "t.jsonl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LLMCompressError, match="no text in it"):
            read_text(tmp_path / name, "text")
    (tmp_path / "t.txt").write_bytes(b"ab\xff")
    with pytest.raises(LLMCompressError, match=r"byte 2 is not UTF-8"):
        read_text(tmp_path / "t.txt", "text")


def test_batches_shrink_where_logits_would_not_fit() -> None:
    assert rows_at_once(16, 256, 2048) == 16
    assert rows_at_once(16, 2048, 10_000) == 6
    assert rows_at_once(16, 8192, 256_000) == 1


def test_a_metric_is_one_entry_and_flows_to_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A throw-away metric: reverse KL, whose budget the suite names."""
    from llmcompress.evaluate import results, text, text_metrics
    from llmcompress.evaluate.suite import TextEntry

    reverse = text_metrics.TextMetric("reverse_kl", "KL(q || p)", "nats", 0.0, of_both=lambda p, q: kl(q, p))
    for module in (text, results, text_metrics):
        monkeypatch.setattr(module, "TEXT_METRICS", (*text_metrics.TEXT_METRICS, reverse), raising=False)
    base = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    comp = torch.randn(7, 7, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(126).reshape(18, 7) % 7
    figures = compare_rows(Table(base), Table(comp), tokens, batch_size=2)
    swapped = compare_rows(Table(comp), Table(base), tokens, batch_size=2)
    assert figures.by_metric["reverse_kl"].pair_N == pytest.approx(swapped.by_metric["kl"].pair_N)
    entry = TextEntry(name="t", file="t.txt", budgets={"reverse_kl": 1e-6, "top1_agreement": 1.0})
    result = results.text_result(entry, figures, seed=0)
    row = result.figure("reverse_kl")
    assert (row.budget, row.verdict, result.verdict) == (1e-6, "fail", "fail")
    assert result.figure("top1_agreement").verdict == "pass" and result.figure("kl").verdict is None
    assert type(result).model_validate_json(result.model_dump_json()) == result
    with pytest.raises(LLMCompressError, match="unknown text metric 'reverse_lk'"):
        text_metrics.text_metric("reverse_lk")


def test_every_metric_says_what_two_equal_models_give() -> None:
    from llmcompress.evaluate.text_metrics import TEXT_METRICS

    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    figures = compare_rows(Table(table), Table(table), torch.arange(14).reshape(2, 7) % 7, batch_size=2)
    for metric in TEXT_METRICS:
        assert (metric.of_one is None) != (metric.of_both is None)
        values = {metric.scale(float(value)) for value in figures.by_metric[metric.name].pair_N}
        assert values == {metric.same} and metric.loss((metric.same, metric.same))[1] <= max(metric.same, 0)


def test_a_result_of_the_first_version_is_read() -> None:
    from llmcompress.report import TextResult

    old = {
        "name": "t", "num_tokens": 9, "seq_len": 3, "baseline_perplexity": 2.0, "compressed_perplexity": 3.0,
        "perplexity_ratio_interval": [1.4, 1.6], "kl": 0.1, "kl_interval": [0.05, 0.2], "top1_agreement": 0.9,
        "shared_vocabulary": None, "budget_kl": 0.15, "budget_perplexity_ratio": None, "verdict": "inconclusive",
    }  # fmt: skip
    result = TextResult.model_validate(old)
    assert (result.kl, result.kl_interval, result.top1_agreement) == (0.1, (0.05, 0.2), 0.9)
    assert (result.baseline_perplexity, result.compressed_perplexity) == (2.0, 3.0)
    assert (result.figure("perplexity").value, result.budget_kl, result.budget_perplexity_ratio) == (1.5, 0.15, None)
