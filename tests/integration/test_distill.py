"""Distillation end to end on tiny models: every kind of student, every way to ask for nonsense."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmcompress.errors import LLMCompressError
from llmcompress.progress import Silent
from llmcompress.recipe import Recipe
from llmcompress.report import Distillation, RunReport
from llmcompress.run import run
from tests import tiny_models

Make = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    texts = [tiny_models.words(24, seed=seed) for seed in range(40)]
    path.write_text("".join(json.dumps({"text": text, "label": n % 3}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture
def distill(tmp_path: Path, data: Path) -> Callable[..., Distillation]:
    """distill(teacher, out, **settings): run one stage of a few steps and give what the report says of it."""

    def go(
        teacher: Path, out: str = "out", stages: list[Any] | None = None, seed: int = 0, **settings: Any
    ) -> Distillation:
        training = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2} | settings.pop("training", {})
        stage = {"data": {"path": str(data), "seq_len": 32}, "training": training} | settings
        head = {"model": str(teacher), "output": str(tmp_path / out), "seed": seed}
        run(Recipe.of(head | {"stages": [{"distill": stage}, *(stages or [])]}), Silent())
        found = RunReport.load(tmp_path / out).distillation
        assert found is not None
        return found

    return go


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def score(found: Distillation, metric: str) -> Any:
    return next(one for one in found.scores if one.metric == metric)


def encoder(folder: Path, auto: str, layers: int = 4, seed: int = 0, **changes: Any) -> Path:
    """A tiny BERT with the tokenizer that masking needs."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 96} | changes
    config = transformers.BertConfig(num_hidden_layers=layers, pad_token_id=0, **shape)
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(5, 96))])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names).save_pretrained(
        folder
    )
    return folder


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


@pytest.mark.parametrize("one_at_a_time", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_cache_stands_in_for_the_teachers(
    make: Make, distill: Any, tmp_path: Path, monkeypatch: Any, one_at_a_time: bool
) -> None:
    from llmcompress.distill import ends

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
    most, load = 0, ends.load

    def watched(checkpoint: Any, *how: Any) -> Any:
        nonlocal most
        found = load(checkpoint, *how)
        loaded.append(checkpoint.name)
        if checkpoint.name != str(student):
            alive.add(found[0])
            most = max(most, len(alive))
        return found

    monkeypatch.setattr(ends, "load", watched)
    filled = distill(first, "filled", **settings, **kept)
    assert filled.cache is not None and not filled.cache.reused and filled.cache.largest_rest < 1e-6
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
        small.cache is not None and not small.cache.reused and 0 < small.cache.mean_rest < small.cache.largest_rest < 1
    )
    whole, folded = (score(one, "KL to the teacher") for one in (online, small))
    assert 0 < folded.before < whole.before


@pytest.mark.parametrize("scheme", ["W3A16", pytest.param("NF4", marks=pytest.mark.slow)])
def test_a_quantized_student_is_trained_on_its_grid(
    make: Make, compress: Any, distill: Any, tmp_path: Path, scheme: str
) -> None:
    teacher = make()
    compress(teacher, tmp_path / "small", scheme=scheme)
    before = RunReport.load(tmp_path / "small")
    found = distill(
        teacher, stages=[{"verify": {}}, {"card": {}}], student=str(tmp_path / "small"),
        training={"max_steps": 4, "learning_rate": 2e-3}, adapter={"rank": 8},
    )  # fmt: skip
    assert found.grid is not None and found.grid.num_linears == 14 and 0 < found.grid.changed_codes_frac < 0.5
    after = RunReport.load(tmp_path / "out")
    assert after.output is not None and before.output is not None
    assert (after.output.format, after.output.weights_bytes) == (before.output.format, before.output.weights_bytes)
    assert [row.scheme for row in after.linears] == [row.scheme for row in before.linears]
    assert all(check.passed for check in after.checks) and len(after.checks) == 8
    config = [json.loads((tmp_path / one / "config.json").read_text()) for one in ("small", "out")]
    assert config[0] == config[1]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W2A16"])
def test_training_on_the_grid_recovers_what_quantizing_lost(tmp_path: Path, scheme: str) -> None:
    """On trained weights, and on rows that the student was not trained on."""
    from llmcompress import resources

    text = resources.folder("calibration") / "tiny.jsonl"
    small, out = tmp_path / "small", tmp_path / "out"
    quantize = {"scheme": scheme, "group_size": 64, "calibration": "tiny", "num_samples": 32}
    data = {"path": str(text), "seq_len": 128, "heldout_frac": 0.1}
    training = {"max_steps": 100, "learning_rate": 1e-3}
    head = {"model": "bundled/tiny", "seed": 0}
    run(Recipe.of(head | {"output": str(small), "stages": [{"quantize": quantize}]}), Silent())
    stage = {"data": data, "training": training, "student": str(small)}
    run(Recipe.of(head | {"output": str(out), "stages": [{"distill": stage}]}), Silent())
    found = RunReport.load(out).distillation
    assert found is not None
    kl = score(found, "KL to the teacher")
    assert kl.after < 0.9 * kl.before


@pytest.mark.parametrize("settings, foreign, said", [
    pytest.param(
        {"scheme": "NF4"}, False, "quantized (bitsandbytes); run with our own dequantized weights",
        marks=pytest.mark.slow,
    ),
    ({"scheme": "NF4"}, True, "quantized (bitsandbytes); run by transformers with that format's own package"),
    ({"scheme": "W4A16", "format": "gptq"}, False, "quantized (gptq); run with our own dequantized weights"),
])  # fmt: skip
def test_a_quantized_teacher(
    make: Make, compress: Any, distill: Any, tmp_path: Path, settings: dict[str, str], foreign: bool, said: str
) -> None:
    compress(make(), tmp_path / "small", **settings)
    if foreign:
        shutil.rmtree(tmp_path / "small" / "llmcompress")
    found = distill(tmp_path / "small", keep=0.5)
    assert any(said in note for note in found.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and RunReport.load(tmp_path / "out").output.format == "plain"  # type: ignore[union-attr]


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
    (tmp_path / "held.txt").write_text(tiny_models.words(400, seed=9))
    held = {"name": "held", "file": "held.txt", "field": "text", "seq_len": 32, "num_tokens": 320, "budget_kl": 0.1}
    suite = {"name": "s", "description": "one text", "tasks": [], "texts": [held]}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    found = distill(teacher, keep=0.5, training={"max_steps": 12})

    def text_of(baseline: Path) -> Any:
        settings = EvaluateSettings(suite=str(tmp_path / "suite.yaml"))
        opened = Checkpoint.open(baseline)
        return evaluate(tmp_path / "out", opened, settings, seed=0, progress=Silent(), samples_dir=None).texts[0]

    beside, apart = text_of(teacher), text_of(other)
    assert 0 < beside.kl < apart.kl and beside.shared_entries is None
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


@pytest.mark.parametrize("auto, losses, metric", [
    ("AutoModelForMaskedLM", {"forward_kl": 5, "ce": 2, "hidden_cosine": 1}, "perplexity"),
    ("AutoModelForSequenceClassification", {"embedding": 1, "hidden_mse": 1, "attention_mse": 1, "forward_kl": 1}, "accuracy"),
    ("AutoModel", {}, "cosine to the teacher"),
])  # fmt: skip
def test_encoders(distill: Any, tmp_path: Path, auto: str, losses: dict[str, float], metric: str) -> None:
    import transformers

    teacher = encoder(tmp_path / "teacher", auto, **({"num_labels": 3} if "Classification" in auto else {}))
    phases = {"phase_frac": 0.5} if "attention_mse" in losses else {}
    verify: list[Any] = [{"verify": {}}] if auto == "AutoModelForMaskedLM" else []
    found = distill(
        teacher, stages=[*verify, {"card": {}}], keep=0.5, losses=losses, training={"max_steps": 12}, **phases
    )
    assert score(found, metric).after is not None and found.kind in ("masked", "classification", "embedding")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 2
    if metric.startswith("cosine"):
        assert score(found, metric).after > score(found, metric).before


def test_a_student_writes_its_own_text(make: Make, compress: Any, distill: Any, tmp_path: Path) -> None:
    """Also one that is on its grid, with two teachers and a vocabulary that differs in padding rows."""
    pytest.importorskip("trl")
    teacher, shape = make(), tiny_models.SHAPE | {"vocab_size": 112}
    wide = tiny_models.save(tmp_path / "wide", tiny_models.configs()["llama"].__class__(**shape), seed=3)
    tiny_models.save_tokenizer(wide)
    compress(teacher, tmp_path / "small", scheme="W3A16")
    asked = {"on_policy": {"lmbda": 1.0, "max_new_tokens": 8}}
    for name, more in (("grid", {"student": str(tmp_path / "small"), "teachers": [str(wide)]}), ("cut", {"keep": 0.5})):
        found = distill(teacher, name, [{"card": {}}], **asked, **more)
        assert found.losses == {"js": 1.0} and found.on_policy is not None
        assert found.on_policy.own_batches == found.on_policy.batches == 3 < found.on_policy.own_tokens <= 3 * 4 * 8
        assert "the student wrote the text of 3 of 3 batches itself" in (tmp_path / name / "README.md").read_text()
    before, after = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("llama-source", "cut"))
    assert after == before | {"num_hidden_layers": 1, "transformers_version": after["transformers_version"]}


def test_who_writes_no_text_cannot_be_trained_on_it(make: Make, distill: Any, tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match="a masked model writes no text"):
        distill(encoder(tmp_path / "bert", "AutoModelForMaskedLM"), keep=0.5, on_policy={})
    packed = {"path": str(tmp_path / "train.jsonl"), "packing": True}
    with pytest.raises(LLMCompressError, match="packed rows have no prompt"):
        distill(make(), keep=0.5, on_policy={}, data=packed)


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
        ({"student": str(encoder(tmp_path / "bert", "AutoModelForMaskedLM"))}, "is for masked, its teacher for causal"),
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
