"""A streamed model computes what the whole one does, bit for bit, and holds no more than one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.models import meta
from llmcompress.models.loading import load_model
from llmcompress.models.streamed import CheckpointWeights, StreamedModel, stream_checkpoint
from tests import tiny_models

BATCHES = ((2, 9), (1, 9), (3, 4), (1, 40))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, shape, generator=generator) for shape in BATCHES]


def whole(folder: Path) -> list[torch.Tensor]:
    model = load_model(folder)
    with torch.inference_mode():
        return [model(input_ids=batch, use_cache=False).logits for batch in batches()]


def streamed(folder: Path, **bounds: int) -> StreamedModel:
    checkpoint = Checkpoint.open(folder)
    model = meta.build(checkpoint)
    cpu = torch.device("cpu")
    return StreamedModel(model, CheckpointWeights(checkpoint, model), cpu, torch.float32, **bounds)


@pytest.mark.parametrize("name", sorted(tiny_models.configs()))
def test_logits_are_those_of_the_whole_model_bit_for_bit(tmp_path: Path, name: str) -> None:
    folder = tiny_models.save(tmp_path / "model", tiny_models.configs()[name], dtype=torch.bfloat16)
    in_memory = list(streamed(folder, keep_bytes=0).logits(batches()))
    on_disk = list(streamed(folder, keep_bytes=0, activation_bytes=0).logits(batches()))
    for expected, first, second in zip(whole(folder), in_memory, on_disk, strict=True):
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt2", "opt"])
def test_generate_writes_what_the_whole_model_writes(tmp_path: Path, name: str) -> None:
    folder = tiny_models.save(tmp_path / "model", tiny_models.configs()[name])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    prompt = batches()[1]
    expected = load_model(folder).generate(prompt, **options)
    for keep_bytes in (0, 1 << 30):
        assert torch.equal(streamed(folder, keep_bytes=keep_bytes).model.generate(prompt, **options), expected)


def test_a_layer_is_in_memory_only_while_it_computes(tmp_path: Path) -> None:
    config = tiny_models.configs()["llama"]
    config.num_hidden_layers = 5
    model = streamed(tiny_models.save(tmp_path / "model", config), keep_bytes=0)
    layers = model.model.model.layers  # type: ignore[union-attr]

    def resident() -> list[int]:
        return [number for number, layer in enumerate(layers) if not next(layer.parameters()).is_meta]  # type: ignore[arg-type, union-attr]

    seen: list[list[int]] = []
    for layer in layers:  # type: ignore[union-attr]
        layer.input_layernorm.register_forward_hook(lambda *_: seen.append(resident()))  # type: ignore[union-attr]
    results = model.logits(batches())
    next(results)
    assert seen == [[number] for number in range(5) for _ in BATCHES]
    assert not model.model.lm_head.weight.is_meta  # type: ignore[union-attr]
    results.close()  # type: ignore[attr-defined]
    assert resident() == []
    assert model.model.lm_head.weight.is_meta  # type: ignore[union-attr]


def test_two_models_go_side_by_side(tmp_path: Path) -> None:
    folders = [tiny_models.save(tmp_path / str(seed), tiny_models.configs()["qwen2"], seed=seed) for seed in (0, 1)]
    pairs = zip(*(stream_checkpoint(Checkpoint.open(folder)).logits(batches()) for folder in folders), strict=True)
    for ours, theirs in zip(pairs, zip(*map(whole, folders), strict=True), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_missing_tensor_is_known_before_anything_runs(tmp_path: Path) -> None:
    config = tiny_models.configs()["llama"]
    folder = tiny_models.save(tmp_path / "model", config)
    config.num_hidden_layers = 3
    config.save_pretrained(folder)
    with pytest.raises(LLMCompressError, match=r"no tensor for model\.layers\.2"):
        stream_checkpoint(Checkpoint.open(folder))
