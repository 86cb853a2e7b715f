"""Students cut from a teacher: what is cut away for being useless changes nothing, and the rest is a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.distill.cut import _TIED_HEADS, contributions, find_widths, student_from
from llmcompress.errors import LLMCompressError
from llmcompress.models.blocks import decoder_layers, weight_OI
from tests import tiny_models

CAUSAL = sorted(tiny_models.configs())
TOKENS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
NOTHING: dict[str, Any] = {"keep": None, "layers": (), "keep_units": None, "keep_heads": None, "batches": [BATCH]}


def random_model(config: Any, auto: str = "AutoModelForCausalLM") -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.08)
    return model.eval()  # type: ignore[no-any-return]


def bert(layers: int = 3) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH)[0]  # type: ignore[no-any-return]


def deeper(name: str, layers: int = 4) -> Any:
    config = tiny_models.configs()[name]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % len(config.layer_types)] for i in range(layers)]
    config.num_hidden_layers = layers
    return config


@pytest.mark.parametrize("name", CAUSAL)
def test_fewer_layers_are_the_teacher_without_the_others(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher = random_model(deeper(name))
    student, said = student_from(teacher, **NOTHING | {"layers": (0, 3)})
    assert "layers 0, 3 of 4" in said
    student.save_pretrained(tmp_path)  # type: ignore[operator]
    found = decoder_layers(teacher)
    kept = [found.layers[0], found.layers[3]]
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    path, _, leaf = found.path.rpartition(".")
    setattr(teacher.get_submodule(path), leaf, nn.ModuleList(kept))
    teacher.config.num_hidden_layers = 2
    if getattr(teacher.config, "layer_types", None):
        teacher.config.layer_types = [teacher.config.layer_types[i] for i in (0, 3)]
    expected = logits(teacher)
    torch.testing.assert_close(logits(student), expected)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(reloaded.eval()), expected)


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_units_that_do_nothing_are_those_that_leave(name: str) -> None:
    config = bert() if name == "bert" else deeper(name, 2)
    teacher = random_model(config, "AutoModelForMaskedLM" if name == "bert" else "AutoModelForCausalLM")
    dead = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64]
    if name == "gpt2":
        dead = torch.randperm(256, generator=torch.Generator().manual_seed(1))[:128]
    for layer in decoder_layers(teacher).layers:
        down = layer.get_submodule(find_widths(layer, teacher.config, heads=False).down)
        with torch.no_grad():
            weight_OI(down)[:, dead] = 0
    before = logits(teacher)
    student, said = student_from(teacher, **NOTHING | {"keep_units": 0.5})
    assert "feed-forward units" in said
    torch.testing.assert_close(logits(student), before, rtol=1e-4, atol=1e-4)
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(student) < count(teacher)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_heads_that_do_nothing_are_those_that_leave(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher = random_model(deeper(name, 2))
    for index, layer in enumerate(decoder_layers(teacher).layers):
        output = layer.get_submodule("self_attn.o_proj")
        with torch.no_grad():  # one of two key-value groups, another in each layer
            weight_OI(output)[:, 32 * index : 32 * (index + 1)] = 0
    before = logits(teacher)
    student, said = student_from(teacher, **NOTHING | {"keep_heads": 0.5})
    assert "2 of 4 heads" in said
    torch.testing.assert_close(logits(student), before, rtol=1e-4, atol=1e-4)
    student.save_pretrained(tmp_path)  # type: ignore[operator]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(student))


def test_contributions_are_their_formula_and_padding_does_not_count() -> None:
    linear = nn.Linear(5, 3, bias=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

    x = torch.randn(2, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    got = contributions(Model(), {"a": linear}, [{"x": x, "attention_mask": mask}])["a"]
    seen = x[mask.bool()].double()
    expected = torch.stack(
        [(seen[:, j, None] * linear.weight[:, j].double()).square().sum(-1).mean().sqrt() for j in range(5)]
    )
    torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize(
    "layers, message", [((0, 9), "9 is out of range"), ((2, 1), "increasing"), ((1, 1), "each layer once")]
)
def test_layers_that_are_wrong(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(LLMCompressError, match=message):
        student_from(random_model(deeper("llama")), **NOTHING | {"layers": layers})


@pytest.mark.parametrize(
    "name", ["AlbertConfig", "BertConfig", "DistilBertConfig", "ElectraConfig", "MPNetConfig", "RobertaConfig"]
)
def test_heads_of_encoders_are_refused_since_their_config_cannot_say_so(name: str) -> None:
    """Of the BERT family, transformers makes the same attention from half the heads, each twice as large."""
    import transformers

    def attention(**changes: int) -> list[tuple[int, ...]]:
        shape = {"hidden_size": 64, "dim": 64, "num_attention_heads": 4, "n_heads": 4, "embedding_size": 64}
        config = getattr(transformers, name)(vocab_size=96, num_hidden_layers=1, n_layers=1, **(shape | changes))
        torch.manual_seed(0)
        found = transformers.AutoModel.from_config(config)
        return [tuple(p.shape) for path, p in found.named_parameters() if "attention" in path and 64 in p.shape]

    fewer = attention(num_attention_heads=2, n_heads=2, head_dim=16, attention_head_size=16)
    assert fewer == attention(), "it took head_dim: fewer heads can be cut after all"
    config = getattr(transformers, name)()
    assert config.model_type in _TIED_HEADS


def test_heads_of_bert_are_refused_with_the_reason() -> None:
    with pytest.raises(
        LLMCompressError, match=r"bert: computes the size of a head as hidden size over heads \(64 / 4\)"
    ):
        student_from(random_model(bert(), "AutoModelForMaskedLM"), **NOTHING | {"keep_heads": 0.5})
