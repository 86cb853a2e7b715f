"""adapter_config.json is somebody else's: what it may hold, and what is refused in a line before PEFT reads it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.errors import LLMCompressError
from llmcompress.finetune.adapter import Adapter

LINEAR = "model.layers.0.self_attn.q_proj"
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    named = {f"base_model.model.{LINEAR}.lora_{part}.weight": tensor for part, tensor in tensors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    return tmp_path


def opened(folder: Path, **changes: Any) -> Adapter:
    (folder / "adapter_config.json").write_text(json.dumps(GOOD | changes))
    return Adapter.open(str(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": "many"}, "r is 'many'; must be a number from 1 up"),
        ({"r": 10**30}, "r is 1000"),
        ({"r": None}, "rank 0 holds nothing"),
        ({"lora_alpha": [1]}, r"lora_alpha is \[1\]; must be a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; must be a number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be an object of numbers"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object of numbers"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "no pattern of a path"),
        ({"target_modules": "(.*a){20}"}, "no pattern of a path"),
        ({"target_modules": ".*" * 9 + "x"}, "no pattern of a path"),
        ({"exclude_modules": "("}, "no pattern of a path"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "imports a module that the file names"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(changes: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(LLMCompressError, match=said):
        opened(folder, **changes)


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
        ["q_proj", "0.self_attn.v_proj"],
    ],
)
def test_patterns_that_people_write_are_taken(pattern: Any, folder: Path) -> None:
    assert opened(folder, target_modules=pattern).rank(LINEAR) == 2


def test_every_pattern_that_is_taken_is_searched_at_once(folder: Path) -> None:
    adapter = opened(folder, alpha_pattern={".*.*.*.*x": 3.0, "q_proj": 8})
    began = time.monotonic()
    assert adapter.update(LINEAR) is not None
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"r": ' + "9" * 5000 + "}"])
def test_what_is_no_object_is_one_line(text: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(LLMCompressError, match=r"adapter_config\.json"):
        Adapter.open(str(folder))


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "adapter_config.json"
    elsewhere.write_text(json.dumps(GOOD))
    (folder / "adapter_config.json").symlink_to(elsewhere)
    with pytest.raises(LLMCompressError, match="link out of the checkpoint's folder"):
        Adapter.open(str(folder))
