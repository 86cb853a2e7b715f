"""The linter: checkpoints as files, right and wrong, and what each engine's table says of them.

The files are made here by hand, tensor by tensor, so no writer of ours stands between a rule and what it looks at.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.report import EngineVerdict
from llmcompress.verify.check import CheckSettings, check
from llmcompress.verify.compatibility import TABLES, facts, judge, tables

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
GPTQ = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False}  # fmt: skip
CT_WEIGHTS = {"num_bits": 4, "group_size": 128, "symmetric": True, "strategy": "group", "type": "int"}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
      "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS}}}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def gptq_linear(name: str, out: int, inp: int, bits: int, group: int) -> Tensors:
    groups = 1 if group == -1 else -(-inp // group)
    return {
        f"{name}.qweight": torch.zeros(inp * bits // 32, out, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(groups, out * bits // 32, dtype=torch.int32),
        f"{name}.scales": torch.zeros(groups, out, dtype=torch.float16),
        f"{name}.g_idx": torch.zeros(inp, dtype=torch.int32),
    }


def ct_linear(name: str, out: int, inp: int, bits: int, group: int) -> Tensors:
    return {
        f"{name}.weight_packed": torch.zeros(out, -(-inp * bits // 32), dtype=torch.int32),
        f"{name}.weight_scale": torch.zeros(out, -(-inp // group), dtype=torch.float16),
        f"{name}.weight_shape": torch.tensor([out, inp]),
    }


def bnb_linear(name: str, out: int, inp: int) -> Tensors:
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, inp]}).encode()
    return {
        f"{name}.weight": torch.zeros(out * inp // 2, 1, dtype=torch.uint8),
        f"{name}.weight.absmax": torch.zeros(out * inp // 64),
        f"{name}.weight.quant_map": torch.zeros(16),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }


Change = Callable[[Tensors, dict[str, Any]], None]


@pytest.fixture
def verdicts(tmp_path: Path) -> Callable[..., dict[str, EngineVerdict]]:
    """verdicts(declared, linear, …): the table's answers on a checkpoint of two layers, by engine."""

    def build(
        declared: dict[str, Any] | None, linear: Callable[..., Tensors], *shape: int, change: Change | None = None
    ) -> dict[str, EngineVerdict]:
        tensors: Tensors = {"model.embed_tokens.weight": torch.zeros(8, 128), "lm_head.weight": torch.zeros(8, 128)}
        for layer in range(2):
            for local in LINEARS:
                tensors |= linear(f"model.layers.{layer}.{local}", *shape)
        config: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}
        config |= {"quantization_config": json.loads(json.dumps(declared))} if declared else {}
        if change:
            change(tensors, config)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        known = facts(Checkpoint.open(tmp_path))  # the rules alone: transformers itself would miss thirty layers
        return {name: judge(known, name) for name in sorted(tables())}

    return build


def said(verdict: EngineVerdict, level: str = "refuses") -> list[str]:
    return [one.rule for one in verdict.findings if one.level == level]


def test_the_safe_gptq_layout_loads_everywhere(verdicts: Callable[..., dict[str, EngineVerdict]]) -> None:
    found = verdicts(GPTQ, gptq_linear, 128, 256, 4, 128)
    assert {name: one.loads for name, one in found.items()} == dict.fromkeys(tables(), True)
    assert not any(one.findings for one in found.values())
    assert found["transformers"].needs == ["optimum>=1.24", "gptqmodel>=1.4.3"]


def test_plain_weights_load_in_transformers_and_vllm(verdicts: Callable[..., dict[str, EngineVerdict]]) -> None:
    found = verdicts(None, lambda name, out, inp: {f"{name}.weight": torch.zeros(out, inp)}, 128, 256)
    assert found["transformers"].loads and found["vllm"].loads and not found["transformers"].needs


def test_nf4_loads_in_transformers_and_not_in_vllm(verdicts: Callable[..., dict[str, EngineVerdict]]) -> None:
    found = verdicts({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb_linear, 64, 128)
    assert found["transformers"].loads is True and found["vllm"].loads is False and found["gptqmodel"].loads is None
    assert said(found["vllm"]) == ["layout"] and said(found["transformers"]) == []
    ragged = verdicts({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb_linear, 64, 96)
    assert said(ragged["transformers"]) == ["bnb-cpu-in"]
    assert "96 in 12 linears (model.layers.0.mlp.down_proj first)" in ragged["transformers"].findings[0].detail


def test_two_bits_in_compressed_tensors_warn_of_the_kernel(verdicts: Callable[..., dict[str, EngineVerdict]]) -> None:
    declared = CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS | {"num_bits": 2}}}}
    found = verdicts(declared, ct_linear, 128, 256, 2, 128)
    assert found["vllm"].loads is True and said(found["vllm"], "warns") == ["ct-kernel"]
    assert said(found["tgi"]) == ["ct-bits"] and found["sglang"].loads is None


def dropped(suffix: str) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [one for one in tensors if one.endswith(suffix)]:
            del tensors[name]

    return change


def declared(**values: Any) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["quantization_config"] |= values
        for key in [key for key, value in values.items() if value is ...]:
            del config["quantization_config"][key]

    return change


def unpacked(local: str) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [one for one in tensors if f"layers.1.{local}." in one]:
            del tensors[name]
        tensors[f"model.layers.1.{local}.weight"] = torch.zeros(128, 256)

    return change


def doubled(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 256)


def undeclared(tensors: Tensors, config: dict[str, Any]) -> None:
    del config["quantization_config"]


WRONG: list[tuple[str, Change, dict[str, list[str]]]] = [
    ("activation order", declared(desc_act=True), {"vllm": ["gptq-act-order"], "sglang": [], "transformers": []}),
    ("asymmetric", declared(sym=False), {"vllm": ["gptq-grid"], "sglang": ["gptq-grid"], "transformers": ["gptq-v1-zero-points"], "gptqmodel": ["v1-zero-points"], "tgi": []}),
    ("asymmetric v2", declared(sym=False, checkpoint_format="gptq_v2"), {"vllm": ["gptq-grid"], "transformers": [], "gptqmodel": []}),
    ("marlin file", declared(checkpoint_format="marlin"), {"gptqmodel": ["format"], "transformers": ["gptq-format"]}),
    ("no desc_act", declared(desc_act=...), {"vllm": ["required-keys"], "sglang": ["required-keys"], "transformers": []}),
    ("no g_idx", dropped("g_idx"), {"vllm": [], "transformers": ["g-idx"], "tgi": ["g-idx"]}),
    ("mixed q k v", unpacked("self_attn.k_proj"), {"vllm": ["fused-alike"], "sglang": ["fused-alike"], "transformers": [], "tgi": ["fused-alike"]}),
    ("plain down", unpacked("mlp.down_proj"), {"vllm": [], "sglang": []}),
    ("dynamic", declared(dynamic={"+:.*": {"bits": 8}}), {"transformers": ["dynamic"], "gptqmodel": []}),
    ("lm_head", declared(lm_head=True), {"transformers": ["lm-head"], "vllm": []}),
    ("damp 1", declared(damp_percent=1), {"transformers": ["damp"], "vllm": []}),
    ("other group size", declared(group_size=64), {name: ["groups-as-declared"] for name in ("vllm", "sglang", "transformers", "gptqmodel", "tgi")}),
    ("weight beside codes", doubled, {"vllm": ["no-weight-beside-codes"], "transformers": ["no-weight-beside-codes"]}),
    ("not declared", undeclared, {"vllm": ["codes-declared"], "transformers": ["codes-declared"]}),
    ("no codes", dropped("qweight"), {"vllm": ["codes-stored"], "gptqmodel": ["codes-stored"]}),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_is_wrong_is_refused_by_the_engine_that_minds(
    change: Change, expected: dict[str, list[str]], verdicts: Callable[..., dict[str, EngineVerdict]]
) -> None:
    found = verdicts(GPTQ, gptq_linear, 128, 256, 4, 128, change=change)
    assert {name: said(found[name]) for name in expected} == expected
    assert all(found[name].loads is not rules for name in expected if (rules := bool(expected[name])))


@pytest.mark.parametrize(
    ("shape", "engine", "refused", "warned"),
    [
        ((128, 96, 4, 32), "vllm", [], ["marlin-in"]),
        ((32, 128, 4, 32), "vllm", [], ["marlin-out"]),
        ((128, 48, 4, 16), "vllm", ["gptq-group-size", "tile-in"], ["marlin-in"]),
        ((128, 96, 4, 32), "sglang", ["marlin-in"], []),
        ((128, 192, 4, 128), "vllm", ["ragged"], ["marlin-in"]),
        ((128, 256, 3, 128), "vllm", ["gptq-grid"], []),
        ((128, 256, 3, 128), "transformers", [], []),
        ((128, 256, 5, 128), "transformers", ["gptq-bits"], []),
        ((128, 256, 4, -1), "vllm", [], []),
    ],
)
def test_shapes_and_grids(
    shape: tuple[int, int, int, int],
    engine: str,
    refused: list[str],
    warned: list[str],
    verdicts: Callable[..., dict[str, EngineVerdict]],
) -> None:
    found = verdicts(GPTQ | {"bits": shape[2], "group_size": shape[3]}, gptq_linear, *shape)[engine]
    assert (said(found), said(found, "warns")) == (refused, warned)


def test_an_encoder_is_judged_by_transformers_alone(verdicts: Callable[..., dict[str, EngineVerdict]]) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["architectures"] = ["BertForMaskedLM"]

    plain = lambda name, out, inp: {f"{name}.weight": torch.zeros(out, inp)}  # noqa: E731
    found = verdicts(None, plain, 128, 256, change=change)
    assert {name: one.loads for name, one in found.items()} == dict.fromkeys(tables(), None) | {"transformers": True}
    assert said(found["vllm"], "unknown") == ["encoder"]


def weights(**values: Any) -> dict[str, Any]:
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS | values}}}


def tied_with_a_head(tensors: Tensors, config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = True


def a_plain_expert(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors |= gptq_linear("model.layers.0.block_sparse_moe.experts.0.w2", 128, 256, 4, 128)
    tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"] = torch.zeros(128, 256)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
RIGHT: list[tuple[dict[str, Any] | None, Any, tuple[int, ...]]] = [
    (GPTQ, gptq_linear, (128, 256, 4, 128)),
    (GPTQ | {"bits": 8, "group_size": 32}, gptq_linear, (128, 256, 8, 32)),
    (CT, ct_linear, (128, 256, 4, 128)),
    (NF4, bnb_linear, (64, 128)),
    (None, lambda name, out, inp: {f"{name}.weight": torch.zeros(out, inp)}, (128, 256)),
]
MADE_WRONG: list[tuple[dict[str, Any], Any, tuple[int, ...], Change | None]] = [
    *((GPTQ, gptq_linear, (128, 256, 4, 128), row[1]) for row in WRONG),
    (GPTQ, gptq_linear, (128, 256, 4, 128), tied_with_a_head),
    (GPTQ, gptq_linear, (128, 256, 4, 128), a_plain_expert),
    (GPTQ | {"bits": 1}, gptq_linear, (128, 256, 1, 128), None),
    (GPTQ | {"group_size": 16}, gptq_linear, (128, 256, 4, 16), None),
    (GPTQ | {"group_size": 8}, gptq_linear, (40, 40, 4, 8), None),
    (GPTQ, gptq_linear, (128, 192, 4, 128), None),
    (CT | {"format": "naive-quantized"}, ct_linear, (128, 256, 4, 128), None),
    (weights(num_bits=1), ct_linear, (128, 256, 1, 128), None),
    (weights(num_bits=2), ct_linear, (128, 256, 2, 128), None),
    (weights(actorder="group"), ct_linear, (128, 256, 4, 128), None),
    (NF4, bnb_linear, (64, 96), None),
]


def test_every_rule_fires_on_a_wrong_example_and_none_on_a_right_one(
    verdicts: Callable[..., dict[str, EngineVerdict]], tmp_path: Path
) -> None:
    known = {(name, rule.rule) for name, table in tables().items() for rule in table.rules}
    for declared_config, linear, shape in RIGHT:
        found = verdicts(declared_config, linear, *shape)
        assert {one.rule for verdict in found.values() for one in verdict.findings} <= {"layout"}
    fired = set()
    for declared_config, linear, shape, change in MADE_WRONG:
        found = verdicts(declared_config, linear, *shape, change=change)
        fired |= {(name, one.rule) for name, verdict in found.items() for one in verdict.findings}
    (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ | {"bits": 8}))
    found = verdicts(GPTQ, gptq_linear, 128, 256, 4, 128)
    fired |= {(name, one.rule) for name, verdict in found.items() for one in verdict.findings}
    assert not known - fired, "rules without a wrong example"


def test_two_config_files_that_differ(verdicts: Callable[..., dict[str, EngineVerdict]], tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ | {"bits": 8}))
    assert said(verdicts(GPTQ, gptq_linear, 128, 256, 4, 128)["gptqmodel"]) == ["configs-agree"]


def test_an_unrouted_expert_left_plain(verdicts: Callable[..., dict[str, EngineVerdict]]) -> None:
    assert said(verdicts(GPTQ, gptq_linear, 128, 256, 4, 128, change=a_plain_expert)["vllm"]) == ["experts-alike"]


def test_transformers_itself_finds_what_no_rule_looks_at(
    tmp_path: Path, verdicts: Callable[..., dict[str, EngineVerdict]]
) -> None:
    rules = verdicts(CT, ct_linear, 128, 256, 4, 128)
    assert rules["transformers"].loads
    verdict = check(tmp_path, CheckSettings(engine="transformers"))[0]
    assert verdict.loads is False and said(verdict) == ["dry-build"]


def test_an_unknown_engine_names_the_known_ones(
    tmp_path: Path, verdicts: Callable[..., dict[str, EngineVerdict]]
) -> None:
    verdicts(GPTQ, gptq_linear, 128, 256, 4, 128)
    with pytest.raises(LLMCompressError, match="unknown engine 'vlm'") as error:
        check(tmp_path, CheckSettings(engine="vlm"))
    assert error.value.hint == "did you mean 'vllm'?"


def test_every_rule_says_where_it_was_read() -> None:
    for name, table in tables().items():
        assert table.versions and (TABLES / f"{name}.yaml").is_file()
        assert all(rule.source and rule.why for rule in table.rules)
        assert len({rule.rule for rule in table.rules}) == len(table.rules)
