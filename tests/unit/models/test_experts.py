"""The expert view: agreement with fused modules, the tokens an expert sees, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.models import meta
from llmcompress.models.experts import SplitExperts, disagreement, is_fused, routing_of, show_others, sliced, split
from tests import tiny_models


def fused(name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_models.mixtures()[name])
    return next(module for module in model.modules() if is_fused(module))


def parts(seed: int = 0) -> SplitExperts:
    """Experts with random weights, and the fused module's rule of qwen3_moe."""
    made = SplitExperts(fused("qwen3_moe"), ("gate_proj", "up_proj", "down_proj"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(made.named_parameters()):
        meta.set_parameter(made, name, torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("name", tiny_models.mixtures())
def test_every_fused_module_agrees_with_its_split(name: str) -> None:
    assert disagreement(fused(name)) is None


def test_another_activation_than_the_modules_own_is_found() -> None:
    module = fused("mixtral")

    def other(*_args: Any) -> torch.Tensor:
        return torch.zeros(12, 16)

    module.forward = other  # type: ignore[method-assign]
    assert "computes something else" in str(disagreement(module))


def test_names_are_those_on_disk(tmp_path: Path) -> None:
    model = meta.build(Checkpoint.open(tiny_models.save(tmp_path, tiny_models.mixtures()["mixtral"])))
    names = meta.tensor_names(model, Checkpoint.open(tmp_path))
    assert names["model.layers.1.mlp.experts.3.w2.weight"] == "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def test_a_fused_tensor_is_taken_apart_without_reading_it(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_models.save(tmp_path, tiny_models.mixtures()["granitemoe"]))
    apart = sliced(source, meta.build(source))
    whole = source.tensor("model.layers.0.block_sparse_moe.input_linear.weight")
    width = whole.shape[1] // 2
    for expert in range(4):
        up = apart.tensor(f"model.layers.0.block_sparse_moe.experts.{expert}.w3.weight")
        assert torch.equal(up, whole[expert, width:])
    assert sum(t.num_bytes for t in apart.stored.values()) == sum(t.num_bytes for t in source.stored.values())


def test_a_layer_without_experts_is_left_as_it_is(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_models.save(tmp_path, tiny_models.configs()["llama"]))
    model = meta.build(source, split_experts=False)
    before = list(model.modules())
    split(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True)) and sliced(source, model) is source


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_others_change_nothing_of_the_output_and_each_row_says_whose_it_is(share: float) -> None:
    experts, seen = parts(), {}
    hidden_TH, index_TK = torch.randn(40, 64), torch.randint(0, 3, (40, 1)).repeat(1, 2)
    index_TK[:, 1] = 3
    index_TK[index_TK == 1] = 0  # nobody goes to expert 1
    weights_TK = torch.rand(40, 2)
    plain = experts(hidden_TH, index_TK, weights_TK)
    show_others(experts, share)
    for number in range(4):
        linear = experts.get_submodule(f"{number}.gate_proj")
        linear.register_forward_pre_hook(lambda _m, args, number=number: seen.update({number: args[0]}))
    torch.testing.assert_close(experts(hidden_TH, index_TK, weights_TK), plain)
    for number, inputs in seen.items():
        routing = routing_of(inputs)
        assert routing is not None and torch.equal(hidden_TH[routing.tokens_N], inputs)
        own = (index_TK == number).any(1).nonzero()[:, 0]
        assert torch.equal(routing.tokens_N[: routing.num_routed], own)
        assert len(set(routing.tokens_N.tolist())) == len(inputs) >= min(40, round(share * 40))
    assert (1 in seen) == (share > 0)


def test_padding_is_no_token_of_an_expert() -> None:
    """The solver maps an expert's rows back to the batch's mask; the rows' tokens are flat positions of [B, S]."""
    experts = parts()
    show_others(experts, 0.5)
    rows: list[torch.Tensor] = []
    experts.get_submodule("0.down_proj").register_forward_pre_hook(lambda _m, args: rows.append(args[0]))
    experts(torch.randn(8, 64), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1))
    routing = routing_of(rows[0])
    assert routing is not None and routing.tokens_N.tolist() == list(range(8)), "down reads the same tokens as gate"
