"""A streamed evaluation: lm-eval's scores item by item, text figures, and who streams when."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.evaluate import engines
from llmcompress.evaluate.harness import streamed_lm
from llmcompress.evaluate.text import compare_rows
from llmcompress.models.streamed import stream_checkpoint
from llmcompress.pipeline.run import run
from tests import tiny_models

PAIRS = [
    (tiny_models.words(length, seed), " " + tiny_models.words(more, seed + 100))
    for seed, (length, more) in enumerate([(12, 1), (3, 4), (30, 2), (12, 6), (140, 3), (1, 9)])
] + [("w5 w6 w7", " w8"), ("w5 w6 w7", " w9"), ("", "w9 w10")]


def requests(texts: list[Any]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in texts]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_scores_are_those_of_the_harness_item_by_item(tmp_path: Path, name: str) -> None:
    folder = tiny_models.save(tmp_path / "model", tiny_models.configs()[name])
    tiny_models.save_tokenizer(folder)
    loaded = engines.load(folder)
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=3, backend="causal")
    ours = streamed_lm(stream_checkpoint(Checkpoint.open(str(folder)), keep_bytes=0), loaded.tokenizer, 3)
    for got, expected in zip(ours.loglikelihood(requests(PAIRS)), theirs.loglikelihood(requests(PAIRS)), strict=True):
        assert got[0] == pytest.approx(expected[0], abs=2e-4)
        assert got[1] == expected[1]
    texts = requests([(tiny_models.words(length, length),) for length in (5, 150, 300)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-2, rel=1e-6)
    with pytest.raises(LLMCompressError, match="whole model in memory"):
        ours.generate_until(texts)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("streamed")
    source = tiny_models.save(root / "model", tiny_models.configs()["llama"], dtype=torch.bfloat16)
    tiny_models.save_tokenizer(source)
    quantize = {"method": "rtn", "scheme": "W4A16", "group_size": 32, "format": "gptq"}
    run(Recipe.of({"model": str(source), "output": str(root / "out"), "stages": [{"quantize": quantize}]}), Silent())
    return source, root / "out"


def test_text_figures_of_streamed_models_are_those_of_whole_ones(quantized: tuple[Path, Path]) -> None:
    rows = torch.randint(3, 96, (5, 20), generator=torch.Generator().manual_seed(0))
    base, codes = quantized
    whole = compare_rows(engines.load(base).over, engines.load(codes, "dequantized").over, rows, 2)
    streamed = compare_rows(engines.load(base, "stream").over, engines.load(codes, "stream").over, rows, 2)
    for name, figures in whole.by_metric.items():
        assert (figures.pair_N == streamed.by_metric[name].pair_N).all(), name


def test_what_does_not_fit_is_streamed_and_says_so(
    quantized: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, kernels in zip(quantized, ("plain", "dequantized"), strict=True):
        assert not engines.load(folder, streams=True).streamed
        monkeypatch.setattr(engines, "available_bytes", lambda: engines.ROOM_BYTES)
        loaded = engines.load(folder, streams=True)
        assert loaded.streamed and loaded.kernels == kernels
        assert "a decoder layer in memory at a time: the whole model takes" in loaded.note
        assert not engines.load(folder).streamed  # a caller that times the model, or serves it
        monkeypatch.undo()
    assert "asked for" in engines.load(quantized[0], "stream").note
