"""Merging against two oracles, PEFT's own merge and the formula in float64, on every kind of adapter."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.finetune.update import Update, merged_weight, probe_excess
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from tests import tiny_models

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS, init_lora_weights=False),
    "rslora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS, init_lora_weights=False, use_rslora=True),
    "dora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS, init_lora_weights=False, use_dora=True),
    "patterns": lambda: LoraConfig(
        r=4, lora_alpha=6, target_modules=LINEARS, init_lora_weights=False,
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7}, alpha_pattern={"up_proj": 1},
    ),
    "saved modules": lambda: LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]
    ),
    "adalora": lambda: AdaLoraConfig(
        target_r=2, init_r=6, lora_alpha=9, target_modules=LINEARS, total_step=10, tfinal=2, init_lora_weights=False
    ),
}  # fmt: skip


def save_adapter(model: Path, folder: Path, config: Any, seed: int = 0) -> Path:
    """A random adapter of PEFT's making; AdaLoRA with a rank pattern that differs from linear to linear."""
    torch.manual_seed(seed)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "modules_to_save" in name or "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    if config.peft_type == "ADALORA":
        generator = torch.Generator().manual_seed(seed)
        adapted.peft_config["default"].rank_pattern = {
            name: (torch.rand(6, generator=generator) < 0.5).tolist()
            for name, _ in adapted.base_model.model.named_parameters()
            if ".lora_E." in name
        }
    adapted.save_pretrained(folder)
    return folder


def merge(model: Path, out: Path, *adapters: Path | dict[str, Any], **settings: Any) -> RunReport:
    given = [str(one) if isinstance(one, Path) else one for one in adapters]
    stage = {"adapters": given, "measure": False} | settings
    recipe = {"model": str(model), "output": str(out), "stages": [{"merge": stage}, {"verify": {}}]}
    return run(Recipe.of(recipe), Silent())[out]


@pytest.mark.parametrize("kind", CONFIGS)
def test_merging_equals_peft(kind: str, model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(model, tmp_path / "adapter", CONFIGS[kind]())
    report = merge(model, tmp_path / "out", adapter)
    assert "merged linears" in {check.name for check in report.checks} and len(report.checks) >= 3
    assert not [check for check in report.checks if not check.passed]
    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    expected, ours = plain.merge_and_unload().state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    changed = 0
    for name, value in ours.items():
        error = float((value - expected[name]).abs().max() / expected[name].abs().max())
        assert error <= 1e-6, name
        changed += not torch.equal(value, load_file(model / "model.safetensors")[name])
    assert changed == {"saved modules": 3}.get(kind, 14)
    if kind == "saved modules":
        assert report.merge is not None and report.merge.replaced_parameters == ["lm_head.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_weight_is_the_formula_in_float64_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, b, a = (torch.randn(shape, generator=generator) for shape in ((48, 80), (48, 5), (5, 80)))
    update = Update(b, a, 0.37)
    expected = (weight.double() + 0.37 * (b.double() @ a.double())).to(dtype)
    assert torch.equal(merged_weight(weight, [update]).to(dtype), expected)
    assert 0 < probe_excess(expected, weight, [update], 0) <= 1
    wrong = expected.clone()
    wrong[7] = (weight + 0.38 * (b @ a))[7].to(dtype)
    assert probe_excess(wrong, weight, [update], 0) > 1


def test_a_merge_without_the_scale_would_be_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, b, a = (torch.randn(shape, generator=generator) for shape in ((48, 80), (48, 5), (5, 80)))
    assert probe_excess((weight + b @ a).float(), weight, [Update(b, a, 2.0)], 0) > 100


def test_several_adapters_with_weights(model: Path, tmp_path: Path) -> None:
    first = save_adapter(model, tmp_path / "a", CONFIGS["lora"](), 1)
    second = save_adapter(model, tmp_path / "b", CONFIGS["adalora"](), 2)
    merge(model, tmp_path / "out", {"path": str(first), "weight": 0.25}, {"path": str(second), "weight": -1.5})
    parts = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), path) for path in (first, second)]
    base, ours = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        deltas: list[Any] = [one.base_model.model.get_submodule(name).get_delta_weight("default") for one in parts]
        expected = base[f"{name}.weight"] + 0.25 * deltas[0] - 1.5 * deltas[1]
        assert torch.allclose(ours[f"{name}.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_transposed_biased_and_tied_models_merge_too(name: str, tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path / name, tiny_models.configs()[name])
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else LINEARS
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    adapter = save_adapter(model, tmp_path / "adapter", config)
    merge(model, tmp_path / "out", adapter)
    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    expected = plain.merge_and_unload().state_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for key, value in expected.items():
        assert float((again[key] - value).abs().max()) <= 1e-6 * float(value.abs().max().clamp(min=1e-3)), key


def test_onto_nf4_values_is_what_bitsandbytes_holds(model: Path, tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    adapter = save_adapter(model, tmp_path / "adapter", CONFIGS["lora"]())
    merge(model, tmp_path / "out", adapter, onto="dequantized")
    base, ours = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    saved = load_file(adapter / "adapter_model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        codes, state = bnb.quantize_4bit(base[f"{name}.weight"], quant_type="nf4", blocksize=64)
        b, a = (saved[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
        expected = bnb.dequantize_4bit(codes, state) + 1.5 * (b @ a)
        assert torch.allclose(ours[f"{name}.weight"], expected, atol=1e-6)


def change(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("breakage", "said"),
    [
        ({"config": {"r": 0}}, "an adapter of rank 0 holds nothing"),
        ({"config": {"peft_type": "IA3"}}, "peft_type is IA3"),
        ({"config": {"bias": "all"}}, "bias is 'all'"),
        ({"config": {"lora_bias": True}}, "lora_bias is set"),
        ({"rename": ("layers.1.", "layers.7.")}, "has no such linear"),
        ({"shape": True}, "q_proj is [64, 48] there and [64, 64] in"),
        ({"lose": "lora_B"}, "has no lora_B"),
        ({"onto": "dequantized", "weight": 0.5, "kind": "dora"}, "holds DoRA, which has no half"),
        ({"embedding": True}, "model.embed_tokens.weight is [99, 64] there and [96, 64] in"),
        ({"missing": True}, "no such folder"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    breakage: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(model, tmp_path / "adapter", CONFIGS[breakage.get("kind", "lora")]())
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if "config" in breakage:
        change(adapter, **breakage["config"])
    if "rename" in breakage:
        tensors = {name.replace(*breakage["rename"]): value for name, value in tensors.items()}
    if "shape" in breakage:
        tensors = {n: v[:, :48].contiguous() if "q_proj.lora_A" in n else v for n, v in tensors.items()}
    if "lose" in breakage:
        tensors = {name: value for name, value in tensors.items() if breakage["lose"] not in name}
    if "embedding" in breakage:
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(99, 64)
    save_file(tensors, file)
    path = tmp_path / "nowhere" if "missing" in breakage else adapter
    with pytest.raises(LLMCompressError) as caught:
        merge(model, tmp_path / "out", {"path": str(path), "weight": breakage.get("weight", 1.0)})
    text = "\n".join(caught.value.lines())
    assert said in text and ("embedding" not in breakage or "3 tokens were added for it" in text)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_larger_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(model, tmp_path / "adapter", CONFIGS["lora"]())
    tiny_models.save_tokenizer(adapter, vocab_size=100)
    with pytest.raises(LLMCompressError, match="its tokenizer has 100 tokens") as caught:
        merge(model, tmp_path / "out", adapter)
    assert "4 tokens were added for it" in str(caught.value.hint)


MEMORY = """
import sys, resource, os
from pathlib import Path
from llmcompress.finetune.merge import plan_merge, write_merged
from llmcompress.finetune.settings import AdapterRef
from llmcompress.checkpoint.reader import Checkpoint
plan = plan_merge(Checkpoint.open(sys.argv[1]), [AdapterRef(path=sys.argv[2])], "original", None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_merged(plan, Path(sys.argv[3]), "original", Silent())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    grown = []
    for depth in (4, 16):
        config = tiny_models.configs()["llama"]
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, depth
        model = tiny_models.save(tmp_path / f"m{depth}", config)
        adapter = save_adapter(model, tmp_path / f"a{depth}", CONFIGS["lora"]())
        command = [sys.executable, "-c", MEMORY, str(model), str(adapter), str(tmp_path / f"out{depth}")]
        grown.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    assert resource and grown[1] < grown[0] + 20_000, grown  # KiB; the deeper model is 180 MB larger


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens).logits  # type: ignore[no-any-return]


def test_a_lora_on_an_output_head_is_merged_onto_the_weight_that_peft_saved_below_it(tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(model)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapter = save_adapter(model, tmp_path / "adapter", config)
    assert any("base_layer" in name for name in load_file(adapter / "adapter_model.safetensors"))
    report = merge(model, tmp_path / "out", adapter, measure=True)
    assert {check.name: check.passed for check in report.checks}["merged logits"]
    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(plain))


def test_an_adapter_of_a_resized_vocabulary_is_merged_where_the_hint_was_followed(tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(model)
    resized = AutoModelForCausalLM.from_pretrained(model)
    resized.resize_token_embeddings(104)
    resized.save_pretrained(tmp_path / "trained on")
    config = LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, modules_to_save=["embed_tokens"]
    )
    adapter = save_adapter(tmp_path / "trained on", tmp_path / "adapter", config)
    with pytest.raises(LLMCompressError, match=r"is .104, 64. there and .96, 64.") as caught:
        merge(model, tmp_path / "out", adapter)
    assert "resized" in "".join(caught.value.lines())
    torch.manual_seed(9)  # whoever follows the hint has other values in the new rows
    again = AutoModelForCausalLM.from_pretrained(model)
    again.resize_token_embeddings(104, mean_resizing=False)
    again.save_pretrained(tmp_path / "resized")
    tiny_models.save_tokenizer(tmp_path / "resized")
    merge(tmp_path / "resized", tmp_path / "out", adapter)
    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "trained on"), adapter)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(plain))


def test_a_replaced_embedding_that_the_output_shares_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path / "model", tiny_models.configs()["gpt2"])
    config = LoraConfig(
        r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, modules_to_save=["wte"]
    )
    adapter = save_adapter(model, tmp_path / "adapter", config)
    with pytest.raises(LLMCompressError, match=r"transformer.wte.weight, which .* shares with its output"):
        merge(model, tmp_path / "out", adapter)


def test_a_merge_that_is_not_peft_s_fails_its_check(tmp_path: Path) -> None:
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.finetune.merge_target import plan_merge
    from llmcompress.finetune.retention import peft_check
    from llmcompress.finetune.settings import AdapterRef

    model = tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"])
    adapter = save_adapter(model, tmp_path / "adapter", CONFIGS["lora"]())
    plan = plan_merge(Checkpoint.open(model), [AdapterRef(path=str(adapter))], "auto", None)
    check = peft_check(plan, model, seed=0)  # the base, where the merged model ought to be
    assert check.ran and not check.passed
