"""Verify: a sound folder passes, and each way of breaking one fails the check that is there for it, by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.run import run
from llmcompress.report import Check, RunReport
from llmcompress.verify import fresh
from llmcompress.verify.behaviour import relative_error
from llmcompress.verify.stage import COMPUTED, STATIC, Request, VerifySettings, verify
from tests import tiny_models

LINEAR = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT/gptq, OUT/compressed_tensors of a random Llama in `model` beside it."""
    root = tmp_path_factory.mktemp("verify")
    source = tiny_models.save(root / "model", tiny_models.configs()["llama"], dtype=torch.bfloat16)
    tiny_models.save_tokenizer(source)
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    quantize = {"method": "rtn", "scheme": "W8A16", "group_size": 32, "format": ["gptq", "compressed_tensors"]}
    recipe = {"model": str(source), "output": str(root / "out"), "stages": [{"quantize": quantize}]}
    run(Recipe.of(recipe), Silent())
    return root / "out"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "gptq", tmp_path / "gptq"))


def checked(folder: Path, **settings: Any) -> dict[str, Check]:
    return {check.name: check for check in fresh.checks(Request(folder=folder, settings=VerifySettings(**settings)))}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if not check.passed]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], keep_digest: bool = True) -> None:
    """Change the tensors of a folder; with `keep_digest` its report is made to agree, so that only content is wrong."""
    import hashlib

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if keep_digest:
        report = RunReport.load(folder)
        assert report.output is not None
        report.output.digests["model.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
        report.save(folder)


def test_a_sound_folder_passes_in_a_process_of_its_own(made: Path) -> None:
    found = {check.name: check for check in verify(made / "compressed_tensors", VerifySettings(), progress=Silent())}
    assert tuple(found) == STATIC + COMPUTED
    assert not failed(found) and all(check.ran for check in found.values())
    assert "bound 0.5" in found["logits"].detail and "compressed-tensors" in found["engine"].detail
    assert "chat_template.jinja, generation_config.json" in found["side files"].detail


def test_without_forward_nothing_is_computed(folder: Path) -> None:
    assert tuple(checked(folder, forward=False)) == STATIC


def test_a_byte_that_changed(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = checked(folder, forward=False)
    assert "files" in failed(found) and found["files"].detail == "model.safetensors has changed"


def swap_codes(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.qweight"][0] ^= 1


def double_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.scales"] *= 2


def lose_scales(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LINEAR}.scales"]


def leave_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LINEAR}.weight"] = torch.zeros(64, 128)


def leave_junk(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.mlp.down_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)


def lose_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def change_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] += 1


def recast_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


@pytest.mark.parametrize(
    ("change", "expected", "said"),
    [
        (swap_codes, ["round trip"], LINEAR),
        (double_scales, ["round trip"], LINEAR),
        (lose_scales, ["tensors", "round trip"], f"missing: {LINEAR}.scales"),
        (leave_weight, ["tensors"], f"stray: {LINEAR}.weight"),
        (leave_junk, ["tensors"], "stray: model.layers.7.mlp.down_proj.qweight"),
        (lose_norm, ["tensors", "untouched"], "missing: model.norm.weight"),
        (change_norm, ["untouched"], "model.norm.weight"),
        (recast_norm, ["untouched"], "model.norm.weight"),
    ],
)
def test_tensors_that_are_wrong_though_every_digest_agrees(
    change: Callable[[dict[str, torch.Tensor]], None], expected: list[str], said: str, folder: Path
) -> None:
    rewrite(folder, change)
    found = checked(folder, forward=False)
    assert failed(found) == expected
    assert said in found[expected[0]].detail


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not the source's"),
        ("chat_template.jinja", None, "chat_template.jinja is missing"),
        ("generation_config.json", '{"eos_token_id": 3}', "generation_config.json is not the source's"),
    ],
)
def test_side_files_are_the_sources(name: str, content: str | None, said: str, folder: Path) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    found = checked(folder, forward=False)
    assert failed(found) == ["side files"] and found["side files"].detail == said


def test_config_may_differ_in_its_quantization_alone(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert checked(folder, forward=False)["side files"].detail == "config.json: rms_norm_eps differs"


def test_logits_beyond_the_bound_fail_and_say_both(folder: Path) -> None:
    found = checked(folder, logits_bound=1e-9)
    assert failed(found) == ["logits"] and "(bound 1e-09)" in found["logits"].detail


def test_a_linear_of_noise_is_beyond_the_default_bound(folder: Path) -> None:
    def noise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [one for one in tensors if one.endswith("qweight")]:
            tensors[name] = torch.randint(-(2**31), 2**31 - 1, tensors[name].shape, dtype=torch.int32)

    rewrite(folder, noise)
    assert {"round trip", "logits"} <= set(failed(checked(folder)))


def test_scales_that_overflow_give_logits_that_are_not_finite(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[f"{LINEAR}.scales"].fill_(float("inf")))
    found = checked(folder)
    assert "logits" in failed(found) and "not all finite" in found["logits"].detail


@pytest.fixture
def moved(folder: Path) -> Iterator[Path]:
    """A folder whose source is gone."""
    report = RunReport.load(folder)
    assert report.source is not None
    report.source.name = str(folder / "nowhere")
    report.save(folder)
    yield folder


def test_without_its_source_what_needs_it_is_not_run(moved: Path) -> None:
    found = checked(moved)
    assert not failed(found)
    assert [name for name, check in found.items() if not check.ran and name != "engine"] == [
        "untouched",
        "side files",
        "logits",
    ]
    assert "no such folder" in found["logits"].detail


def test_a_source_that_has_changed_is_not_compared_with(folder: Path, made: Path) -> None:
    report = RunReport.load(folder)
    assert report.source is not None
    report.source.identity = "0" * 64
    report.save(folder)
    assert "its sha256 differs" in checked(folder, forward=False)["untouched"].detail


def test_a_process_that_dies_fails_what_it_did_not_reach(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.json").write_text("{")
    found = {check.name: check for check in verify(folder, VerifySettings(forward=False), progress=Silent())}
    assert tuple(found) == STATIC and "not valid JSON" in found["tensors"].detail


def test_the_relative_error_is_what_it_says() -> None:
    original = torch.tensor([[[3.0, -3.0]]], dtype=torch.float64)
    assert relative_error(original, original) == 0
    assert relative_error(torch.zeros_like(original), original) == 1
    assert relative_error(-original, original) == 4
    assert relative_error(torch.zeros(1, 1, 3), original) == float("inf")


@pytest.mark.parametrize("consent", [False, True])
def test_a_reports_recipe_is_not_asked_for_consent(
    consent: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[object, object]] = []
    report = RunReport.load(folder)
    report.recipe |= {"trust_remote_code": True, "allow_pickle": True}
    report.save(folder)

    def refuse(name: str, **asked: object) -> Checkpoint:
        given.append((asked["trust_remote_code"], asked["allow_pickle"]))
        raise LLMCompressError("not today")

    monkeypatch.setattr("llmcompress.verify.fresh.Checkpoint.open", refuse)
    request = Request(
        folder=folder, settings=VerifySettings(forward=False), trust_remote_code=consent, allow_pickle=consent
    )
    assert "not today" in fresh.original(report, request)
    assert given == [(consent, consent)]


def test_what_a_check_does_not_expect_is_its_own_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Check:
        raise RecursionError("too deep")

    monkeypatch.setattr("llmcompress.verify.files.round_trip", fail)
    found = checked(folder, forward=False)
    assert failed(found) == ["round trip"] and "RecursionError: too deep" in found["round trip"].detail


def test_a_source_that_does_not_load_leaves_the_rest_to_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompress.verify import behaviour

    def refuse(source: Checkpoint) -> object:
        raise LLMCompressError("no such architecture")

    monkeypatch.setattr(behaviour, "stream_checkpoint", refuse)
    found = checked(folder)
    assert not failed(found) and not found["logits"].ran and found["generation"].ran
    assert "the source does not load: no such architecture" in found["logits"].detail


@pytest.mark.parametrize("format", ["compressed_tensors", "bitsandbytes", "gptq"])
def test_an_engine_is_given_a_large_checkpoint_in_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    from llmcompress.evaluate import engines
    from llmcompress.verify import behaviour

    config = tiny_models.configs()["mistral"]
    config.num_hidden_layers = 5
    source = tiny_models.save(tmp_path / "model", config, dtype=torch.bfloat16)
    tiny_models.save_tokenizer(source)
    quantize: dict[str, Any] = {"method": "rtn", "format": format}
    quantize |= {"ignore": ["model.layers.3.mlp.up_proj"]} if format == "compressed_tensors" else {}
    quantize |= {"scheme": "NF4"} if format == "bitsandbytes" else {"scheme": "W4A16", "group_size": 32}
    recipe = {"model": str(source), "output": str(tmp_path / "out"), "stages": [{"quantize": quantize}]}
    run(Recipe.of(recipe), Silent())
    if engines.unavailable(tmp_path / "out") is not None:
        pytest.skip("its engine is not installed")
    monkeypatch.setattr(behaviour, "CUT_BYTES", 2 * 200_000)
    checks = checked(tmp_path / "out")
    assert not failed(checks)
    assert "of layers 0-1, 2-3, 4 of 5" in checks["engine"].detail

    if (
        format == "compressed_tensors"
    ):  # an engine that reads other scales than we do is seen in the cut that they are in
        other = behaviour.cut

        def damaged(checkpoint: Checkpoint, out: Path, start: int, stop: int) -> None:
            other(checkpoint, out, start, stop)
            tensors = load_file(out / "model.safetensors")
            if start == 2:
                tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 2
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(behaviour, "cut", damaged)
        assert failed(checked(tmp_path / "out")) == ["engine"]
