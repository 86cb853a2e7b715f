"""Distillation end to end on tiny models: every kind of student, every way to ask for nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.report import Distillation, RunReport
from tests import tiny_models

Make = Callable[..., Path]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def score(found: Distillation, metric: str) -> Any:
    return next(one for one in found.scores if one.metric == metric)


def test_a_cut_student_learns_and_loads(make: Make, distill: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher = make("llama", num_hidden_layers=4)
    before = weights(teacher)
    found = distill(
        teacher, stages=[{"verify": {}}, {"card": {}}], layers=[0, 3], keep_units=0.5, training={"max_steps": 20},
        losses={"forward_kl": 1, "hidden_mse": 1, "attention_kl": 1}, temperature=2.0,
    )  # fmt: skip
    kl = score(found, "KL to the teacher")
    assert kl.after < 0.9 * kl.before and kl.teacher is None
    assert found.layer_maps == ["0:1,1:3"] and "layers 0, 3 of 4; 64 of 128" in found.student
    assert any("attention switched from sdpa to eager" in note for note in found.notes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2 and found.student_parameters == sum(
        p.numel() for p in model.parameters()
    )
    assert found.student_rows_per_s and found.teacher_rows_per_s and found.training.steps == 20
    assert all(torch.equal(one, before[name]) for name, one in weights(teacher).items())
    report = RunReport.load(tmp_path / "out")
    assert all(check.passed for check in report.checks) and {c.name for c in report.checks} >= {
        "loads",
        "files",
        "tensors",
    }
    assert not list(tmp_path.glob(".out*"))


def test_the_same_run_twice_is_the_same_student_and_is_not_done_twice(make: Make, distill: Any, tmp_path: Path) -> None:
    teacher = make()
    distill(teacher, "a", keep=0.5)
    distill(teacher, "b", keep=0.5)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(one, b[name]) for name, one in a.items())
    stamp = (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns
    distill(teacher, "a", keep=0.5)
    assert (tmp_path / "a" / "model.safetensors").stat().st_mtime_ns == stamp


def test_padding_rows_are_left_out_and_said(make: Make, distill: Any, tmp_path: Path) -> None:
    teacher = make()
    wide = tiny_models.save(
        tmp_path / "wide", tiny_models.configs()["llama"].__class__(**tiny_models.SHAPE | {"vocab_size": 112})
    )
    tiny_models.save_tokenizer(wide)
    found = distill(teacher, student=str(wide))
    assert any("96 and 112 rows of logits" in note for note in found.notes)


def test_a_student_is_evaluated_against_its_teacher_and_against_another(
    make: Make, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.evaluate.stage import EvaluateSettings, evaluate

    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    teacher, other = make(), tmp_path / "other"
    tiny_models.save(other, tiny_models.configs()["llama"], seed=4)
    tiny_models.save_tokenizer(other)
    foreign = tiny_models.save(tmp_path / "foreign", tiny_models.configs()["llama"], seed=4)
    tiny_models.save_tokenizer(foreign, vocab_size=90)
    (tmp_path / "held.txt").write_text(tiny_models.words(400, seed=90))
    held = {"name": "held", "file": "held.txt", "field": "text", "seq_len": 32, "num_tokens": 320, "budget_kl": 0.1}
    suite = {"name": "s", "description": "one text", "tasks": [], "texts": [held]}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    found = distill(teacher, keep=0.5, training={"max_steps": 12})

    def text_of(baseline: Path) -> Any:
        settings = EvaluateSettings(suite=str(tmp_path / "suite.yaml"))
        opened = Checkpoint.open(baseline)
        return evaluate(tmp_path / "out", opened, settings, seed=0, progress=Silent(), samples_dir=None).texts[0]

    beside, apart = text_of(teacher), text_of(other)
    assert 0 < beside.kl < apart.kl and beside.shared_vocabulary is None
    assert beside.kl == pytest.approx(score(found, "KL to the teacher").after, rel=0.3)
    assert beside.compressed_perplexity == apart.compressed_perplexity
    assert beside.baseline_perplexity != apart.baseline_perplexity
    with pytest.raises(LLMCompressError, match="tokenizers turn it into different tokens"):
        text_of(foreign)


def test_a_student_from_a_config_alone(make: Make, distill: Any, tmp_path: Path) -> None:
    config = tiny_models.configs()["llama"]
    config.hidden_size, config.head_dim, config.num_hidden_layers = 32, 8, 1
    config.save_pretrained(tmp_path / "config")
    found = distill(
        make(), student=str(tmp_path / "config" / "config.json"), losses={"forward_kl": 1, "hidden_cosine": 1}
    )
    assert found.student.startswith("random weights") and found.projection_parameters == 32 * 64
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_wrong_ends_are_refused(make: Make, distill: Any, tmp_path: Path) -> None:
    teacher = make("llama", num_hidden_layers=4)
    other = tiny_models.save(tmp_path / "other", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(other, vocab_size=90)
    narrow = tiny_models.configs()["llama"]
    narrow.hidden_size, narrow.head_dim = 32, 8
    narrow.save_pretrained(tmp_path / "narrow")
    small = {"student": str(tmp_path / "narrow")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"student": str(other)}, "different tokenizers: 96 tokens against 90"),
        ({"keep": 0.5, "losses": {"hidden_mse": 1}, "layer_map": "0:4,5:1"}, "layers 0 to 3, 4 is none"),
        ({**small, "losses": {"hidden_mse": 1}, "projection": "none"}, "hidden sizes differ, 32 .* projection is none"),
        ({"layers": [0, 4]}, "4 is out of range"),
        ({}, "no student"),
        ({"keep": 0.5, "losses": {"sentence": 1}}, "a causal model gives no sentence vector"),
        (
            {"student": str(tiny_models.save_encoder(tmp_path / "bert", "AutoModelForMaskedLM"))},
            "is for masked, its teacher for causal",
        ),
    ]
    for settings, message in cases:
        with pytest.raises(LLMCompressError, match=message):
            distill(teacher, "bad", **settings)
        assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("settings, message", [
    ({"temperature": 0}, "temperature: input should be greater than 0"),
    ({"temperature": -1}, "temperature: input should be greater than 0"),
    ({"losses": {"kl": 1}}, "losses"),
    ({"losses": {"ce": 0}}, "every loss has weight 0"),
    ({"weight": 0}, "every teacher has weight 0"),
    ({"keep": 0.5, "student": "x"}, "nothing to cut"),
    ({"layer_map": "1-2"}, "layer_map"),
    ({"cache": "c", "losses": {"hidden_mse": 1}}, "a cache holds predictions only"),
    ({"one_at_a_time": True}, "one_at_a_time needs a cache"),
    ({"phase_frac": 0.5}, "losses of both kinds"),
    ({"on_policy": {}, "cache": "c"}, "a cache holds predictions on the data's text"),
    ({"on_policy": {}, "losses": {"hidden_mse": 1}}, "on_policy: matches predictions alone, not hidden_mse"),
    ({"on_policy": {}, "losses": {"ce": 1}}, "has no labels"),
    ({"on_policy": {"lmbda": 1.5}}, "lmbda: input should be less than or equal to 1"),
])  # fmt: skip
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    stage = {"data": "x.jsonl", **settings}
    with pytest.raises(LLMCompressError, match=message):
        Recipe.of({"model": "m", "output": "o", "stages": [{"distill": stage}]})
