"""Speed: what is written down is what was timed, in turn, each model in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.card.build import card_text
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.speed import MeasureSettings, _Worker, measure
from llmcompress.report import Measurement, Speed
from tests.unit.card.sample_report import full_report


def test_both_models_are_timed_in_turn(dense: Path, make_checkpoint: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, str]] = []
    ask = _Worker.ask
    monkeypatch.setattr(
        _Worker, "ask", lambda self, command: asked.append((self._folder, command)) or ask(self, command)
    )
    other = make_checkpoint(num_hidden_layers=1)  # type: ignore[operator]
    settings = MeasureSettings(prompt_tokens=500, new_tokens=4, rounds=3)
    found = measure(other, Checkpoint.open(dense), settings, progress=Silent())
    assert (found.prompt_tokens, found.new_tokens, found.batch_size) == (60, 4, 1)  # 64 positions, less the new ones
    order = [folder for folder, what in asked if what == "round"]
    assert order == [dense, other, other, dense, dense, other]
    for row in found.rows:
        assert len(row.prefill_tokens_per_s) == len(row.decode_tokens_per_s) == 3
        assert min(*row.prefill_tokens_per_s, *row.decode_tokens_per_s, row.load_s) > 0
        assert row.peak_memory_bytes > row.memory_before_load_bytes > 10_000_000
        assert row.engine.startswith("transformers") and row.device == "cpu"


def test_a_checkpoint_that_does_not_load_is_said(dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in dense.iterdir():
        if path.name != "model.safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    with pytest.raises(LLMCompressError, match=r"measure: .*broken"):
        measure(broken, Checkpoint.open(dense), MeasureSettings(rounds=1, new_tokens=1), progress=Silent())


def test_more_new_tokens_than_positions(dense: Path) -> None:
    with pytest.raises(LLMCompressError, match="new_tokens is 64; the models take 64 positions"):
        measure(dense, Checkpoint.open(dense), MeasureSettings(new_tokens=64), progress=Silent())


def test_the_card_shows_medians_with_their_spread() -> None:
    common = {
        "engine": "transformers 5.23.0",
        "engine_note": "plain",
        "device": "cpu",
        "dtype": "float32",
        "load_s": 1.5,
    }
    common |= {"memory_before_load_bytes": 400_000_000, "peak_memory_bytes": 500_000_000}
    rows = [
        Speed(model="baseline", prefill_tokens_per_s=[90, 100, 300], decode_tokens_per_s=[10, 20, 15], **common),
        Speed(model="compressed", prefill_tokens_per_s=[50, 60, 40], decode_tokens_per_s=[30, 60, 45], **common),
    ]
    report = full_report()
    identity = report.source.identity if report.source else ""
    report.speed = Measurement(
        baseline=identity,
        prompt_tokens=128,
        new_tokens=32,
        batch_size=1,
        num_threads=2,
        hardware="a processor",
        rows=rows,
    )
    said = card_text(report, {})
    assert "| prefill, tokens/s | 100 [90, 300] | 50 [40, 60] | 0.50 x |" in said
    assert "| decode, tokens/s | 15 [10, 20] | 45 [30, 60] | 3.00 x |" in said
    assert "a processor, 2 threads: one" in said and "another checkpoint" not in said and "decode 3.00 x" in said
    report.speed = None
    assert "## Speed" not in card_text(report, {})
