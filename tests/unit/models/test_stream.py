"""The layer stream against the plain way of doing the same thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.models import meta as skeleton
from llmcompress.models.activations import ActivationFile, Slot
from llmcompress.models.blocks import decoder_layers, linears, put_weight_OI, weight_OI
from llmcompress.models.shared_inputs import shared_inputs
from llmcompress.models.stream import Calls, Original, capture, plain, recomputed, share_arguments, staged
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


class Solves:
    """A solver that calls `solve(names, inputs, batch numbers)`."""

    def __init__(self, solve: Callable[[Sequence[str], list[torch.Tensor], list[int]], object]) -> None:
        self._solve, self._seen = solve, []  # type: ignore[var-annotated]
        self.originals: dict[str, list[torch.Tensor]] = {}

    def see(self, names: Sequence[str], inputs: torch.Tensor, batch: int, original: torch.Tensor | None = None) -> None:
        self._seen.append((inputs, batch))
        if original is not None:
            self.originals.setdefault(names[0], []).append(original)

    def solve(self, names: Sequence[str]) -> None:
        self._solve(names, [x for x, _ in self._seen], [number for _, number in self._seen])
        self.forget()

    def forget(self) -> None:
        self._seen = []

    def present(self, name: str) -> None:
        pass


def groups(folder: Path, index: int, call: Calls) -> list[list[str]]:
    layer = decoder_layers(skeleton.build(Checkpoint.open(folder))).layers[index]
    return shared_inputs(layer, index, call, list(linears(layer)))


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
@pytest.mark.parametrize("form", [staged, recomputed])
def test_each_linear_runs_once_a_batch_and_sees_what_earlier_ones_became(
    tmp_path: Path, name: str, form: Callable[..., list[str]]
) -> None:
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

            def solve(names: Sequence[str], inputs: list[torch.Tensor], numbers: list[int]) -> None:
                assert numbers == [0, 1, 2]
                for local in names:
                    order.append(local)  # noqa: B023
                    inputs_of[local] = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])  # noqa: B023
                    module = targets[local]  # noqa: B023
                    put_weight_OI(module, (weight_OI(module) * 8).round() / 8)

            hooks = [
                module.register_forward_hook(lambda _m, _i, _o, local=local, runs=runs: runs.update([local]))
                for local, module in targets.items()
            ]
            assert form(layer, index, calls, groups(folder, index, calls[0]), Solves(solve)) == []
            for hook in hooks:
                hook.remove()
            if form is staged:
                assert runs == dict.fromkeys(targets, 3), "one forward a batch"
            assert sorted(order) == sorted(targets)
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_the_original_moves_beside_untouched(tmp_path: Path, name: str) -> None:
    """What is shown of it is what its linears read when it runs alone, whatever happens to the weights beside it."""
    folder = tiny_models.save(tmp_path, tiny_models.configs()[name])
    ours, beside, alone = (dense_model(folder) for _ in range(3))
    layers = [decoder_layers(model).layers for model in (ours, beside, alone)]
    with torch.no_grad():
        calls, seen_calls, expected = captured(ours), captured(beside), captured(alone)
        for index in range(len(layers[0])):
            inputs: dict[str, list[torch.Tensor]] = {}
            for local, module in linears(layers[2][index]).items():
                module.register_forward_pre_hook(
                    lambda _m, x, local=local, i=inputs: i.setdefault(local, []).append(x[0])
                )
            plain(layers[2][index], index, expected)
            targets = linears(layers[0][index])
            solver = Solves(lambda names, *_, t=targets: [put_weight_OI(t[n], 0 * weight_OI(t[n])) for n in names])
            together = groups(folder, index, calls[0])
            staged(layers[0][index], index, calls, together, solver, original=Original(layers[1][index], seen_calls))
            assert sorted(solver.originals) == sorted(names[0] for names in together)
            for local, found in solver.originals.items():
                assert all(torch.equal(a, b) for a, b in zip(found, inputs[local], strict=True)), local
    for call, moved, whole in zip(calls, seen_calls, expected, strict=True):
        assert torch.equal(moved.hidden_BSH, whole.hidden_BSH) and not torch.equal(call.hidden_BSH, whole.hidden_BSH)


def test_linears_that_read_one_tensor_are_found_without_numbers(tmp_path: Path) -> None:
    def shared(name: str) -> list[list[str]]:
        folder = tiny_models.save(tmp_path / name, tiny_models.configs()[name])
        with torch.no_grad():
            found = groups(folder, 0, captured(dense_model(folder))[0])
        return [[one.rsplit(".", 1)[-1] for one in names] for names in found]

    assert shared("llama") == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert shared("gpt2") == [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]
    assert shared("phi") == [["q_proj", "k_proj", "v_proj"], ["dense"], ["fc1"], ["fc2"]] or shared("phi")[0] == [
        "q_proj", "k_proj", "v_proj", "fc1",
    ]  # fmt: skip


def test_every_group_is_one_tensor_in_the_real_pass(tmp_path: Path) -> None:
    for name in tiny_models.configs():
        folder = tiny_models.save(tmp_path / name, tiny_models.configs()[name])
        model = dense_model(folder)
        layer = decoder_layers(model).layers[0]
        calls = captured(model)
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(lambda _m, x, local=local, seen=seen: seen.update({local: x[0]}))
            for local, module in linears(layer).items()
        ]
        with torch.no_grad():
            plain(layer, 0, calls[:1])
        for hook in hooks:
            hook.remove()
        for names in groups(folder, 0, captured(model)[0]):
            assert all(seen[one] is seen[names[0]] for one in names), (name, names)


def test_a_layer_that_looks_at_values_has_every_linear_by_itself() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.two(x) if x.sum() > 0 else x  # type: ignore[no-any-return]

    found = shared_inputs(Layer(), 0, Calls(torch.ones(1, 2, 4), [((), {})]), ["one", "two"])
    assert found == [["one"], ["two"]]


@pytest.mark.parametrize("form", [staged, recomputed])
def test_a_linear_that_no_batch_reaches_is_named(form: Callable[..., list[str]]) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    layer = Layer()
    calls = [Calls(torch.ones(1, 2, 4), [((), {})])]
    with torch.no_grad():
        assert form(layer, 0, calls, [["used"], ["unused"]], Solves(lambda *_: None)) == ["unused"]


@pytest.mark.parametrize("form", [staged, recomputed])
def test_batches_that_take_different_ways_are_seen_by_what_they_reach(form: Callable[..., list[str]]) -> None:
    """Two experts, as in a mixture: the first batch goes to the second one only."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, expert in enumerate(self.experts):
                if bool((x[..., 0] == number).any()) or bool((x[..., 0] == 2).all()):
                    x = torch.cat([x[..., :1], expert(x)[..., 1:]], -1)
            return x

    layer = Layer()
    first = [1.0, 0.0, 2.0]
    calls = [Calls(torch.tensor([[[kind, 1.0, 1.0, 1.0]]]), [((), {})]) for kind in first]
    seen: dict[str, list[int]] = {}
    with torch.no_grad():
        left = form(layer, 0, calls, [["experts.0"], ["experts.1"]], Solves(lambda n, _x, b: seen.update({n[0]: b})))
    assert left == [] and seen == {"experts.0": [1, 2], "experts.1": [0, 2]}


@pytest.mark.parametrize("form", [staged, recomputed])
def test_an_error_while_solving_leaves_the_layer_as_it_was(tmp_path: Path, form: Callable[..., list[str]]) -> None:
    model = dense_model(tiny_models.save(tmp_path, tiny_models.configs()["llama"]))

    def fail(*_: object) -> None:
        raise LLMCompressError("no")

    with torch.no_grad():
        layer, calls = decoder_layers(model).layers[0], captured(model)
        with pytest.raises(LLMCompressError):
            form(layer, 0, calls, groups(tmp_path, 0, calls[0]), Solves(fail))
        assert all("forward" not in vars(module) for module in layer.modules())
        plain(layer, 0, calls)


def test_hidden_states_in_a_file_are_the_same_bits(tmp_path: Path) -> None:
    model = dense_model(tiny_models.save(tmp_path, tiny_models.configs()["llama"]))
    with torch.no_grad():
        here, there = captured(model), captured(model)
        file = ActivationFile(tmp_path)
        for call in there:
            call.park(file)
        for index, layer in enumerate(decoder_layers(model).layers):
            plain(layer, index, here)
            plain(layer, index, there)
    assert all(torch.equal(a.hidden_BSH, b.hidden_BSH) for a, b in zip(here, there, strict=True))
    parked = [call for call in there if isinstance(call._hidden, Slot)]
    assert len(parked) == 3 and len({call._hidden.start for call in parked}) == 3  # type: ignore[union-attr]


def test_experts_fused_in_a_form_of_their_own_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_models.save(tmp_path, tiny_models.refused_mixtures()["llama4"]))
    model = skeleton.build(checkpoint)
    with pytest.raises(LLMCompressError, match="fused in a form of their own"):
        decoder_layers(model)


def test_the_skeleton_holds_no_weights(tmp_path: Path) -> None:
    model = skeleton.build(Checkpoint.open(tiny_models.save(tmp_path, tiny_models.configs()["llama"])))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
