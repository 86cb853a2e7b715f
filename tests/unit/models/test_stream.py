"""The layer stream against the plain way of doing the same thing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.models import skeleton
from llmcompress.models.layout import decoder_layers, linears, put_weight_OI, weight_OI
from llmcompress.models.stream import Calls, capture, plain, share_arguments, staged
from tests import tiny_models


def dense_model(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def batches(model: nn.Module, padded: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    tokens = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[1, 12:] = mask[4, 7:] = False
    return list(tokens.split(2)), list(mask.split(2))


def captured(model: nn.Module, padded: bool = False) -> list[Calls]:
    layers = decoder_layers(model)
    found = model.get_submodule(layers.path)
    assert isinstance(found, nn.ModuleList)
    calls = [capture(model, found, t, m) for t, m in zip(*batches(model, padded), strict=True)]
    share_arguments(calls)
    assert list(found) == list(layers.layers), "the layers are put back"
    return calls


@pytest.mark.parametrize("name", tiny_models.configs())
@pytest.mark.parametrize("padded", [False, True])
def test_streaming_layer_by_layer_is_the_models_own_forward(tmp_path: Path, name: str, padded: bool) -> None:
    model = dense_model(tiny_models.save(tmp_path, tiny_models.configs()[name]))
    seen: list[torch.Tensor] = []
    last = decoder_layers(model).layers[-1]
    hook = last.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for tokens, mask in zip(*batches(model, padded), strict=True):
            model(input_ids=tokens, attention_mask=None if bool(mask.all()) else mask.long(), use_cache=False)
        hook.remove()
        calls = captured(model, padded)
        for index, layer in enumerate(decoder_layers(model).layers):
            plain(layer, index, calls)
    for call, expected in zip(calls, seen, strict=True):
        torch.testing.assert_close(call.hidden_BSH, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", tiny_models.configs())
def test_each_linear_runs_once_a_batch_and_sees_what_earlier_ones_became(tmp_path: Path, name: str) -> None:
    """The reference quantizes linear after linear and runs the whole layer again for each: GPTQ's true sequential."""
    folder = tiny_models.save(tmp_path, tiny_models.configs()[name])
    ours, theirs = dense_model(folder), dense_model(folder)
    with torch.no_grad():
        calls, slow = captured(ours), captured(theirs)
        for index, (layer, other) in enumerate(
            zip(decoder_layers(ours).layers, decoder_layers(theirs).layers, strict=True)
        ):
            runs: Counter[str] = Counter()
            order: list[str] = []
            inputs_of: dict[str, torch.Tensor] = {}
            targets = linears(layer)

            def solve(local: str, inputs: list[torch.Tensor], numbers: list[int]) -> None:
                assert numbers == [0, 1, 2]
                order.append(local)  # noqa: B023
                inputs_of[local] = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])  # noqa: B023
                module = targets[local]  # noqa: B023
                put_weight_OI(module, (weight_OI(module) * 8).round() / 8)

            hooks = [
                module.register_forward_hook(lambda _m, _i, _o, local=local, runs=runs: runs.update([local]))
                for local, module in targets.items()
            ]
            assert staged(layer, index, calls, targets, solve) == []
            for hook in hooks:
                hook.remove()
            assert runs == dict.fromkeys(targets, 3), "one forward a batch"
            for local in order:
                module = linears(other)[local]
                seen: list[torch.Tensor] = []
                hook = module.register_forward_pre_hook(lambda _m, x: seen.append(x[0].reshape(-1, x[0].shape[-1])))  # noqa: B023
                plain(other, index, [Calls(c.hidden_BSH, c.arguments) for c in slow])
                hook.remove()
                torch.testing.assert_close(inputs_of[local], torch.cat(seen), rtol=0, atol=0)
                put_weight_OI(module, (weight_OI(module) * 8).round() / 8)
            plain(other, index, slow)
    for fast, expected in zip(calls, slow, strict=True):
        torch.testing.assert_close(fast.hidden_BSH, expected.hidden_BSH, rtol=0, atol=0)


def test_linears_that_read_one_tensor_are_handed_the_very_same(tmp_path: Path) -> None:
    model = dense_model(tiny_models.save(tmp_path, tiny_models.configs()["llama"]))
    seen: dict[str, list[int]] = {}
    with torch.no_grad():
        layer = decoder_layers(model).layers[0]
        staged(layer, 0, captured(model), linears(layer), lambda n, x, _b: seen.update({n: [id(t) for t in x]}))
    names = {name.rsplit(".", 1)[-1]: ids for name, ids in seen.items()}
    assert names["q_proj"] == names["k_proj"] == names["v_proj"]
    assert names["gate_proj"] == names["up_proj"]
    assert len({tuple(ids) for ids in names.values()}) == 4


def test_a_linear_that_no_batch_reaches_is_named(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    layer = Layer()
    calls = [Calls(torch.ones(1, 2, 4), [((), {})])]
    with torch.no_grad():
        assert staged(layer, 0, calls, linears(layer), lambda *_: None) == ["unused"]


def test_an_error_while_solving_leaves_the_layer_as_it_was(tmp_path: Path) -> None:
    model = dense_model(tiny_models.save(tmp_path, tiny_models.configs()["llama"]))

    def fail(*_: object) -> None:
        raise LLMCompressError("no")

    with torch.no_grad():
        layer, calls = decoder_layers(model).layers[0], captured(model)
        with pytest.raises(LLMCompressError):
            staged(layer, 0, calls, linears(layer), fail)
        assert all("forward" not in vars(module) for module in layer.modules())
        plain(layer, 0, calls)


def test_a_fused_mixture_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_models.save(tmp_path, tiny_models.moe_config()))
    model = skeleton.build(checkpoint)
    with pytest.raises(LLMCompressError, match="fused mixture-of-experts"):
        decoder_layers(model)


def test_the_skeleton_holds_no_weights(tmp_path: Path) -> None:
    model = skeleton.build(Checkpoint.open(tiny_models.save(tmp_path, tiny_models.configs()["llama"])))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
