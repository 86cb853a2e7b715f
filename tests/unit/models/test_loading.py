"""Loading: the same numbers that transformers gives, and one line for whatever a folder makes it raise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.errors import LLMCompressError, first_line, third_party
from llmcompress.models import meta
from llmcompress.models.config import hidden_size, is_tied, max_positions, special_token, stored_dtype, text_config
from llmcompress.models.loading import compute_dtype, load_model
from llmcompress.models.tasks import CAUSAL
from tests import tiny_models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"], dtype=torch.bfloat16)
    tiny_models.save_tokenizer(path)
    return path


def test_a_model_is_transformers_own(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(folder)
    assert not model.training and (model.dtype == torch.float32 or model.device.type != "cpu")
    ids = torch.arange(3, 20)[None]
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    with torch.inference_mode():
        assert model(ids.to(model.device)).logits.equal(other(ids.to(model.device)).logits)


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def lose_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


BROKEN = {
    "no such model type": edited(model_type="nobody"),
    "a field of the wrong type": edited(hidden_size="wide"),
    "no heads": edited(num_attention_heads=0),
    "an unknown activation": edited(hidden_act="sine"),
    "an unknown rope": edited(rope_scaling={"rope_type": "spiral", "factor": 2.0}),
    "wider than its weights": edited(intermediate_size=256),
    "a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "a weight is missing": lose_a_weight,
    "a file that ends early": cut_the_file,
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN.keys())
def test_whatever_is_wrong_with_a_folder_is_one_line_that_names_it(
    spoil: Callable[[Path], object], folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(LLMCompressError) as caught:
        load_model(folder)
    assert caught.value.message.startswith(f"{folder}: ") and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "name", ["no such model type", "a field of the wrong type", "no heads", "an unknown activation", "an unknown rope"]
)
def test_a_model_without_weights_fails_as_readably(name: str, folder: Path) -> None:
    BROKEN[name](folder)
    with pytest.raises(LLMCompressError) as caught:
        meta.build(Checkpoint.open(folder))
    assert str(folder) in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "1.0"}', ""])
def test_a_tokenizer_that_does_not_load_names_its_folder(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(LLMCompressError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(folder)
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), RecursionError("deep\nmore"), RuntimeError(" ")])
def test_every_exception_of_a_library_becomes_ours(error: Exception) -> None:
    with pytest.raises(LLMCompressError) as caught, third_party("here: broken", "mend it"):
        raise error
    assert caught.value.message == f"here: broken ({first_line(error)})" and caught.value.hint == "mend it"
    assert caught.value.__cause__ is error


def test_our_own_errors_and_interrupts_pass_through() -> None:
    ours = LLMCompressError("ours")
    with pytest.raises(LLMCompressError) as caught, third_party("theirs"):
        raise ours
    assert caught.value is ours
    with pytest.raises(KeyboardInterrupt), third_party("theirs"):
        raise KeyboardInterrupt
    with pytest.raises(LLMCompressError) as caught, third_party("theirs", "another hint"):
        raise MemoryError
    assert caught.value.hint == "there is not enough memory for it"


INNER = {"hidden_size": 8, "max_position_embeddings": 64, "bos_token_id": [5, 6], "tie_word_embeddings": True}


@pytest.mark.parametrize("config", [INNER, {"text_config": INNER}, {"thinker_config": {"text_config": INNER}}])
def test_numbers_are_the_language_models_wherever_they_stand(config: dict[str, Any]) -> None:
    assert text_config(config) == INNER
    assert (hidden_size(config), max_positions(config), is_tied(config)) == (8, 64, True)
    assert (special_token(config, "bos_token_id"), special_token(config, "eos_token_id")) == (5, None)


def test_a_wrappers_config_object_is_read_like_its_dictionary() -> None:
    from transformers import Gemma3Config, Gemma3TextConfig

    inner = Gemma3TextConfig(hidden_size=24, max_position_embeddings=48, bos_token_id=7)
    config = Gemma3Config(text_config=inner.to_dict())
    for each in (config, config.to_dict()):
        assert (hidden_size(each), max_positions(each), special_token(each, "bos_token_id")) == (24, 48, 7)


def test_the_dtype_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored_dtype({"torch_dtype": "bfloat16"}) == stored_dtype({"text_config": {"dtype": "bfloat16"}})
    assert stored_dtype({"dtype": "float7"}) is None and stored_dtype({}) is None
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        monkeypatch.setattr("llmcompress.models.loading.best_device", lambda device=device: torch.device(device))
        assert compute_dtype({"dtype": "bfloat16"}) == dtype
        assert compute_dtype({}) == torch.float32
    assert CAUSAL.generates
