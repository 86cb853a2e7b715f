"""Several teachers, one after another, and from a cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.errors import LLMCompressError
from llmcompress.report import Distillation
from tests import tiny_models

Make = Callable[..., Path]


def score(found: Distillation, metric: str) -> Any:
    return next(one for one in found.scores if one.metric == metric)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("one_at_a_time", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_cache_stands_in_for_the_teachers(
    make: Make, distill: Any, tmp_path: Path, monkeypatch: Any, one_at_a_time: bool
) -> None:
    from llmcompress.distill import student as student_module
    from llmcompress.distill import teachers as teachers_module

    first = make()
    second = tiny_models.save(tmp_path / "second", tiny_models.configs()["llama"], seed=7)
    tiny_models.save_tokenizer(second)
    student = tiny_models.save(tmp_path / "student", tiny_models.configs()["llama"], seed=9)
    tiny_models.save_tokenizer(student)
    settings = {"teachers": [str(second)], "student": str(student), "temperature": 2.0}
    online = distill(first, "online", **settings)
    kept = {"cache": str(tmp_path / "cache"), "cache_tokens": 96, "one_at_a_time": one_at_a_time}
    loaded: list[str] = []
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, load = 0, teachers_module.load

    def watched(checkpoint: Any, *how: Any) -> Any:
        nonlocal most
        found = load(checkpoint, *how)
        loaded.append(checkpoint.name)
        if checkpoint.name != str(student):
            alive.add(found[0])
            most = max(most, len(alive))
        return found

    monkeypatch.setattr(teachers_module, "load", watched)
    monkeypatch.setattr(student_module, "load", watched)
    filled = distill(first, "filled", **settings, **kept)
    assert filled.cache is not None and not filled.cache.reused and filled.cache.max_tail_mass < 1e-6
    curves = [[point.loss for point in one.training.curve] for one in (online, filled)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert most == (1 if one_at_a_time else 2)
    loaded.clear()
    again = distill(first, "again", seed=0, **settings, **kept, losses={"js": 1})
    assert again.cache is not None and again.cache.reused and again.cache.key == filled.cache.key
    assert loaded == [str(student)], "the teachers were not needed"
    few = {"cache": str(tmp_path / "cache"), "cache_tokens": 4}
    with pytest.raises(LLMCompressError, match="likeliest tokens kept 96, now 4"):
        distill(first, "small", **settings, **few)
    with pytest.raises(
        LLMCompressError, match=r"holds the predictions of .*llama-source .* and the teacher is .*student \("
    ):
        distill(student, "other", student=str(first), **kept)
    assert not (tmp_path / "small").exists() and not (tmp_path / "other").exists()
    small = distill(first, "small", **settings, **few, refill_cache=True)
    assert (
        small.cache is not None
        and not small.cache.reused
        and 0 < small.cache.mean_tail_mass < small.cache.max_tail_mass < 1
    )
    whole, folded = (score(one, "KL to the teacher") for one in (online, small))
    assert 0 < folded.before < whole.before


def test_weights_of_zero_and_one_are_the_single_teacher(make: Make, distill: Any, tmp_path: Path) -> None:
    first = make()
    second = tiny_models.save(tmp_path / "second", tiny_models.configs()["llama"], seed=7)
    tiny_models.save_tokenizer(second)
    both = {"losses": {"forward_kl": 1, "hidden_mse": 1}, "keep": 0.5}
    found = distill(first, "alone", **both)
    pair = distill(first, "pair", weight=1.0, teachers=[{"model": str(second), "weight": 0.0}], **both)
    mixed = distill(first, "mixed", weight=0.5, teachers=[{"model": str(second), "weight": 0.5}], **both)
    alone, with_zero, with_half = (weights(tmp_path / name) for name in ("alone", "pair", "mixed"))
    assert all(torch.equal(one, with_zero[name]) for name, one in alone.items())
    assert any(not torch.equal(one, with_half[name]) for name, one in alone.items())
    assert len(found.teachers) == len(pair.teachers) == 1 and [t.share for t in mixed.teachers] == [0.5, 0.5]
    swapped = distill(first, "swapped", weight=0.0, teachers=[{"model": str(second)}], student=str(first))
    other = distill(second, "other", student=str(first))
    assert [t.identity for t in swapped.teachers] == [t.identity for t in other.teachers]
    s, o = weights(tmp_path / "swapped"), weights(tmp_path / "other")
    assert all(torch.equal(one, o[name]) for name, one in s.items())
