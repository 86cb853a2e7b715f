"""The objective on tiny models: what counts, what does not, and that every source of predictions gives the same loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.distill import cache, losses
from llmcompress.distill.layer_map import layer_map
from llmcompress.distill.objective import Distiller, Objective
from llmcompress.distill.settings import INTERMEDIATE
from llmcompress.distill.teachers import Cached, Online, switch_to_eager
from llmcompress.models.tasks import CAUSAL
from tests import tiny_models

V = 96
TOKENS = torch.randint(3, V, (3, 12), generator=torch.Generator().manual_seed(0))


def model(seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = tiny_models.configs()["llama"]
    for name, value in changes.items():
        setattr(config, name, value)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    found = AutoModelForCausalLM.from_config(config).float()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.1)
    return found.eval()  # type: ignore[no-any-return]


def batch(prompt: int = 0, padding: int = 0) -> dict[str, torch.Tensor]:
    labels = TOKENS.clone()
    labels[:, :prompt] = -100
    mask = torch.ones_like(TOKENS)
    pad = lambda x, value: nn.functional.pad(x, (0, padding), value=value)  # noqa: E731
    return {
        "input_ids": pad(TOKENS, 0), "labels": pad(labels, -100), "attention_mask": pad(mask, 0),
        "row": torch.arange(3),
    }  # fmt: skip


def online(models: Sequence[nn.Module], weights: Sequence[float], intermediates: bool = False, **how: Any) -> Online:
    teachers = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight > 0]
    settings: dict[str, Any] = {"combine": "probabilities", "temperature": 1.0} | how
    return Online(teachers, CAUSAL, V, hidden=intermediates, attentions=intermediates, **settings)


def objective(weights: dict[str, float], **how: Any) -> Objective:
    return Objective(CAUSAL, weights, vocabulary=V, **{"maps": [layer_map("uniform", 2, 2)]} | how)


ALL = dict.fromkeys(("forward_kl", "reverse_kl", "js", "ce", *INTERMEDIATE), 1.0)


@pytest.mark.parametrize("name", list(ALL))
def test_padding_and_prompt_never_count(name: str) -> None:
    student, teacher = model(0), model(1)
    distiller = Distiller(student, online([teacher], [1.0], intermediates=True), objective({name: 1.0}), [(64, 64)])
    plain = distiller(**batch(prompt=4))["loss"].item()
    padded = distiller(**batch(prompt=4, padding=5))["loss"].item()
    assert plain == pytest.approx(padded, rel=1e-4) and plain > 0
    whole = distiller(**batch())["loss"].item()
    assert abs(whole - plain) > 1e-4 * abs(plain)


def test_forward_kl_is_the_mean_over_the_tokens_that_count() -> None:
    student, teacher = model(0), model(1)
    distiller = Distiller(
        student, online([teacher], [1.0], temperature=2.0), objective({"forward_kl": 0.5}, temperature=2.0), []
    )
    got = distiller(**batch(prompt=4))["loss"].item()
    with torch.no_grad():
        q, p = ((m(TOKENS).logits.double() / 2).log_softmax(-1)[:, 3:-1] for m in (student, teacher))
    assert got == pytest.approx(0.5 * 4 * float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_student_like_its_teacher_loses_nothing() -> None:
    teacher = model(1)
    wanted = {name: 1.0 for name in ALL if name != "ce"}
    distiller = Distiller(teacher, online([teacher], [1.0], intermediates=True), objective(wanted), [(64, 64)])
    assert distiller(**batch())["loss"].item() == pytest.approx(0, abs=1e-5)


def test_the_cache_of_every_token_is_the_teacher(tmp_path: Path) -> None:
    student, teacher = model(0), model(1)
    source = online([teacher], [1.0])
    ids, kept = losses.fold(source.predict({"input_ids": TOKENS}, torch.arange(3)).target, V)  # type: ignore[arg-type]
    asked = cache.CacheRequest(
        teachers=(cache.CachedTeacher(name="t", identity="i", share=1.0),), data="d", num_rows=3, row_tokens=12,
        num_kept=V, vocabulary=V, temperature=1.0, combine="probabilities",
    )  # fmt: skip
    made = cache.write(tmp_path, asked, torch.ones(3, 12).bool(), lambda a, b: (ids[a:b], kept[a:b]), 1)
    for name in ("forward_kl", "reverse_kl", "js"):
        values = [
            float(Distiller(student, one, objective({name: 1.0}), [])(**batch())["loss"])
            for one in (source, Cached(made, torch.device("cpu")))
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_weights_of_zero_and_one_are_the_single_teacher(combine: str) -> None:
    first, second = model(1), model(2)
    gradients = []
    for models, weights in (([first], [1.0]), ([first, second], [1.0, 0.0]), ([first, second], [0.5, 0.5])):
        student = model(0)
        source = online(models, weights, intermediates=True, combine=combine)
        Distiller(student, source, objective(ALL, maps=[layer_map("uniform", 2, 2)] * 2), [(64, 64)] * 2)(**batch())[
            "loss"
        ].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))  # type: ignore[union-attr]
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_widths_that_differ_go_through_a_projection_of_the_distiller() -> None:
    student, teacher = model(0, hidden_size=32, head_dim=8), model(1)
    distiller = Distiller(student, online([teacher], [1.0], intermediates=True), objective(ALL), [(32, 64)])
    distiller(**batch())["loss"].backward()
    weight = distiller.projections["0"].weight
    assert tuple(weight.shape) == (64, 32) and weight.grad is not None and bool(weight.grad.any())
    assert not any("projection" in name for name, _ in student.named_parameters())


def test_teachers_are_no_part_of_what_is_trained() -> None:
    student, teacher = model(0), model(1)
    distiller = Distiller(student, online([teacher], [1.0]), objective({"forward_kl": 1.0}), [])
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in student.parameters()}


def test_two_phases() -> None:
    of = objective({"hidden_mse": 2.0, "forward_kl": 3.0}, phase_frac=0.5)
    assert [of.weight("hidden_mse", p) for p in (0.0, 0.49, 0.5, 1.0)] == [2, 2, 0, 0]
    assert [of.weight("forward_kl", p) for p in (0.0, 0.49, 0.5, 1.0)] == [0, 0, 3, 3]


def test_attention_without_probabilities_is_switched_and_said() -> None:
    found = model(0)
    found.set_attn_implementation("sdpa")  # type: ignore[operator]
    notes = switch_to_eager(found, "big")
    assert notes == ["big: attention switched from sdpa to eager, since sdpa returns no probabilities"]
    assert found(TOKENS, output_attentions=True).attentions[0].shape == (3, 4, 12, 12)
    assert switch_to_eager(found, "big") == []


def test_heads_that_differ_in_number_are_averaged() -> None:
    student, teacher = model(0, num_attention_heads=2, num_key_value_heads=2), model(1)
    of = objective({"attention_kl": 1.0})
    distiller = Distiller(student, online([teacher], [1.0], intermediates=True), of, [(64, 64)])
    got = distiller(**batch())["loss"].item()
    with torch.no_grad():
        pairs = zip(*(m(TOKENS, output_attentions=True).attentions for m in (student, teacher)), strict=True)
        values = [
            losses.attention_kl(a.mean(1, keepdim=True), b.mean(1, keepdim=True))[:, :-1].mean() for a, b in pairs
        ]
    assert got == pytest.approx(float(sum(values) / 2), rel=1e-5)
