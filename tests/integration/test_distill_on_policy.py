"""Distillation on the student's own text, end to end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import LLMCompressError
from tests import tiny_models

Make = Callable[..., Path]


@pytest.mark.parametrize("student", ["cut", pytest.param("grid", marks=pytest.mark.slow)])
def test_a_student_writes_its_own_text(make: Make, compress: Any, distill: Any, tmp_path: Path, student: str) -> None:
    """Also one that is on its grid, with two teachers and a vocabulary that differs in padding rows."""
    pytest.importorskip("trl")
    teacher, more = make(), {"keep": 0.5}
    if student == "grid":
        shape = tiny_models.SHAPE | {"vocab_size": 112}
        wide = tiny_models.save(tmp_path / "wide", tiny_models.configs()["llama"].__class__(**shape), seed=3)
        tiny_models.save_tokenizer(wide)
        compress(teacher, tmp_path / "small", scheme="W3A16")
        more = {"student": str(tmp_path / "small"), "teachers": [str(wide)]}
    found = distill(teacher, stages=[{"card": {}}], on_policy={"lmbda": 1.0, "max_new_tokens": 8}, **more)
    assert found.losses == {"js": 1.0} and found.on_policy is not None
    assert found.on_policy.student_batches == found.on_policy.batches == 3 < found.on_policy.student_tokens <= 3 * 4 * 8
    assert "the student generated the text of 3 of 3 batches itself" in (tmp_path / "out" / "README.md").read_text()
    if student == "cut":
        before, after = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("llama-source", "out"))
        assert after == before | {"num_hidden_layers": 1, "transformers_version": after["transformers_version"]}


def test_who_writes_no_text_cannot_be_trained_on_it(make: Make, distill: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    with pytest.raises(LLMCompressError, match="a masked model writes no text"):
        distill(tiny_models.save_encoder(tmp_path / "bert", "AutoModelForMaskedLM"), keep=0.5, on_policy={})
    packed = {"path": str(tmp_path / "train.jsonl"), "packing": True}
    with pytest.raises(LLMCompressError, match="packed rows have no prompt"):
        distill(make(), keep=0.5, on_policy={}, data=packed)


def test_without_trl_it_is_said_what_to_install(
    make: Make, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental", None)
    with pytest.raises(LLMCompressError, match="on_policy: needs trl") as caught:
        distill(make(), keep=0.5, on_policy={})
    assert "llmcompress[train]" in (caught.value.hint or "") and not (tmp_path / "out").exists()
