from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.errors import LLMCompressError
from llmcompress.evaluate import engines
from llmcompress.evaluate.baseline import tokenizer_digest

from .conftest import make_model, make_tokenizer

TOKENS = torch.arange(2, 12)[None]


@pytest.fixture(scope="module")
def nf4(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense checkpoint, quantized and saved by transformers and bitsandbytes themselves."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    folder = tmp_path_factory.mktemp("nf4")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def pretend(dense: Path, folder: Path, method: str) -> Path:
    """A copy of a dense checkpoint whose config claims another layout."""
    for path in dense.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "sym": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def ours(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for the dequantized reader, which has its own tests: the dense model."""
    import sys
    from types import ModuleType

    def load_dequantized(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        return make_model(0).to(dtype)

    module = ModuleType("llmcompress.compress.dequantized")
    monkeypatch.setattr(module, "load_dequantized", load_dequantized, raising=False)
    monkeypatch.setitem(sys.modules, "llmcompress.compress.dequantized", module)


def test_a_plain_checkpoint_is_float32_on_a_cpu(make_checkpoint: Callable[..., Path], dense: Path) -> None:
    half = make_checkpoint(dtype=torch.bfloat16)
    for folder in (dense, half):
        loaded = engines.load(folder)
        assert loaded.engine.startswith("transformers ") and loaded.kernels == "plain"
        assert not loaded.model.training
        if loaded.device == "cpu":
            assert loaded.dtype == "float32"


def test_tied_embeddings_are_not_taken_for_missing_weights(make_checkpoint: Callable[..., Path]) -> None:
    model = engines.load(make_checkpoint(tie_word_embeddings=True)).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_checkpoint_that_lacks_weights_is_refused(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = pretend(dense, tmp_path, "x")
    (folder / "config.json").write_bytes((dense / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LLMCompressError, match=r"1 weights are missing .*layers\.1\.mlp\.up_proj"):
        engines.load(folder)


def test_bitsandbytes_runs_on_its_own_kernels(nf4: Path, dense: Path) -> None:
    loaded = engines.load(nf4)
    assert loaded.engine.startswith("bitsandbytes ")
    assert (loaded.kernels, loaded.layout, loaded.reason) == ("native", "bitsandbytes", None)
    assert loaded.note == "the engine's own kernels on the packed weights"
    with torch.inference_mode():
        close = loaded.model(TOKENS).logits - engines.load(dense).model(TOKENS).logits
    assert 0 < close.abs().max() < 5


@pytest.mark.usefixtures("ours")
def test_a_kernel_that_fails_in_its_first_forward_is_told(nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import nn

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shape '[128, 5]' is invalid\nand more")

    monkeypatch.setattr(nn.modules.Linear4bit, "forward", refuse)
    loaded = engines.load(nf4)
    assert loaded.engine.startswith("transformers ")
    assert loaded.kernels == "dequantized" and loaded.reason == loaded.note.removeprefix("our dequantized weights: ")
    assert loaded.note == (
        "our dequantized weights: bitsandbytes refused it (RuntimeError: shape '[128, 5]' is invalid)"
    )
    with pytest.raises(LLMCompressError, match="cannot be run by bitsandbytes's own kernels"):
        engines.load(nf4, "native")


@pytest.mark.usefixtures("ours")
def test_dequantized_on_request_and_where_packages_are_missing(
    nf4: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engines.load(nf4, "dequantized").note == "our dequantized weights: asked for"
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    gptq = pretend(dense, tmp_path, "gptq")
    assert engines.load(gptq).note == "our dequantized weights: optimum and GPTQModel are not installed"
    with pytest.raises(LLMCompressError, match="optimum and GPTQModel are not installed"):
        engines.load(gptq, "native")


@pytest.mark.usefixtures("ours")
def test_an_unknown_layout_goes_to_our_reader(dense: Path, tmp_path: Path) -> None:
    assert "no engine for quant_method 'other'" in engines.load(pretend(dense, tmp_path, "other")).note


def test_folders_that_do_not_load(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match="its tokenizer cannot be loaded"):
        engines.load(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LLMCompressError, match=r"config\.json: not found"):
        engines.load(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(LLMCompressError):
        engines.load(tmp_path)
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    with pytest.raises(LLMCompressError, match="transformers cannot load it"):
        engines.load(tmp_path)


def test_the_tokenizer_digest_follows_its_files(dense: Path, tmp_path: Path) -> None:
    copy = pretend(dense, tmp_path, "x")
    assert tokenizer_digest(copy) == tokenizer_digest(dense)
    path = copy / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("bird", "bard"), encoding="utf-8")
    assert tokenizer_digest(copy) != tokenizer_digest(dense)


def test_a_guarded_model_names_a_token_without_a_row(dense: Path) -> None:
    loaded = engines.load(dense).guarded()
    assert loaded.logits(TOKENS).shape == (1, 10, loaded.num_logits)
    with pytest.raises(
        LLMCompressError, match=rf"tokenizer\.json: token None has id {loaded.num_logits}, and the model"
    ):
        loaded.logits(torch.tensor([[2, loaded.num_logits]]))


@pytest.mark.usefixtures("ours")
def test_what_an_engine_says_holds_no_path(nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason goes into the report and onto the card."""
    from llmcompress.models import loading

    def refuse(folder: Path, **how: Any) -> Any:
        raise LLMCompressError(f"{how['name']}: transformers cannot load it (KeyError: 'x')")

    monkeypatch.setattr(loading, "load_model", refuse)
    assert (
        engines.load(nf4).note == "our dequantized weights: bitsandbytes: transformers cannot load it (KeyError: 'x')"
    )
