"""Consent to run foreign code comes from the command line or the call, never out of a file that may be downloaded."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.cli.main import run as run_command
from llmcompress.config.recipe import CONSENT, Recipe, load
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.reproduce import reproduce
from llmcompress.pipeline.run import resumed_recipe, run
from llmcompress.report import RunReport
from tests import tiny_models

every_consent = pytest.mark.parametrize("key", CONSENT)


@every_consent
def test_a_recipe_file_cannot_consent(key: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: m\noutput: o\n{key}: true\nstages:\n  - verify: {{}}\n")
    flag = f"--{key.replace('_', '-')}"
    with pytest.raises(LLMCompressError, match=f"{key} is true there") as caught:
        load(file)
    assert flag in (caught.value.hint or "")
    assert getattr(load(file, [f"{key}=true"]), key) is True


def test_a_recipe_file_that_declines_is_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\noutput: o\ntrust_remote_code: false\nstages:\n  - verify: {}\n")
    assert load(file).trust_remote_code is False


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output whose report says that it was made with both consents, beside code that must not run."""
    root = tmp_path_factory.mktemp("consent")
    source = tiny_models.save(root / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(source)
    stages = [{"quantize": {"method": "rtn", "group_size": 32}}]
    run(Recipe.of({"model": str(source), "output": str(root / "out"), "stages": stages}), Silent())
    report = RunReport.load(root / "out")
    report.recipe |= dict.fromkeys(CONSENT, True)
    report.save(root / "out")
    return root / "out"


def test_a_report_cannot_consent(made: Path) -> None:
    with pytest.raises(LLMCompressError) as caught:
        resumed_recipe(made, [{"verify": {}}])
    assert all(f"--{key.replace('_', '-')}" in "\n".join(caught.value.lines()) for key in CONSENT)
    recipe = resumed_recipe(made, [{"verify": {}}], trust_remote_code=True, allow_pickle=True)
    assert recipe.trust_remote_code and recipe.allow_pickle


def test_a_reproduction_needs_its_own_consent_and_writes_no_cache(made: Path, tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match="trust_remote_code is true there"):
        reproduce(made, None, Silent(), allow_pickle=True)
    found = reproduce(made, None, Silent(), trust_remote_code=True, allow_pickle=True)
    assert found.same


CODE = """\
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "evil"
"""
AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.LlamaForCausalLM"}


def with_code(folder: Path, mark: Path, *, known: bool) -> None:
    """Put code into a folder that transformers would run for its config and its tokenizer. known: it could do without."""
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text()) | {"auto_map": AUTO_MAP}
        (folder / "config.json").write_text(json.dumps(config | ({} if known else {"model_type": "evil"})))
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text()) if path.is_file() else {}
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.PreTrainedTokenizerFast"] * 2}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_no_verb_runs_code_that_lies_in_a_folder_or_behind_it(
    known: bool, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source, the output that names it in its report, and an adapter that names it, each with code; all say yes."""
    mark = tmp_path / "mark"
    source, out, adapter = (tmp_path / name for name in ("source", "out", "adapter"))
    shutil.copytree(made.parent / "model", source)
    shutil.copytree(made, out)
    shutil.copytree(out, tmp_path / "other")
    adapter.mkdir()
    parts = {"A": torch.ones(2, 64), "B": torch.ones(64, 2)}
    linear = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{linear}{part}.weight": tensor for part, tensor in parts.items()}, adapter / "adapter_model.safetensors"
    )
    named = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "base_model_name_or_path": str(source),
        "target_modules": ["q_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    for folder in (source, out, adapter):
        with_code(folder, mark, known=known)
    report = RunReport.load(out)
    report.recipe |= {"model": str(source)} | dict.fromkeys(CONSENT, False)
    assert report.source is not None
    report.source.name = str(source)
    report.save(out)
    plain = made.parent / "model"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": tiny_models.words(20, seed)}) for seed in range(8)))
    new = (str(tmp_path / f"new{number}") for number in range(99))
    trained = ["--data", str(rows), "--seq-len", "16", "--max-steps", "1"]
    for arguments in (
        ["plan", source],
        ["quantize", source, "-o", next(new), "--method", "rtn", "--group-size", "32"],
        ["finetune", source, "-o", next(new), "--adapter", "lora", *trained],
        ["merge", source, adapter, "-o", next(new), "--no-measure"],
        ["merge", plain, adapter, "-o", next(new), "--no-measure"],
        ["distill", "--teacher", source, "--keep", "0.5", "-o", next(new), *trained],
        ["evaluate", out, "--suite", "tiny", "--limit", "2"],
        ["evaluate", adapter, "--suite", "tiny", "--limit", "2"],
        ["measure", adapter, "--rounds", "1"],
        ["check", out],
        ["check", adapter],
        ["verify", out],
        ["card", out],
        ["compare", out, tmp_path / "other"],
        ["reproduce", out],
        ["push", out, "a/b", "--dry-run"],
        ["export", source, "-o", tmp_path / "x.gguf"],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))  # transformers asks where it is not told
        assert run_command([str(argument) for argument in arguments]) in (0, 1, 2)
        assert not mark.exists(), f"{arguments[0]} ran it"
