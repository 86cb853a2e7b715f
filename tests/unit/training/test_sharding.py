"""FSDP without its processes: the shipped configuration, what is refused, and NF4 codes under another name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.finetune import lora
from llmcompress.finetune.base import load_base, plan_base, targets
from llmcompress.pipeline.run import run
from llmcompress.training.sharding import CONFIG, REQUIRED, view_codes_as
from tests.unit.finetune.conftest import logits, recipe


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As `accelerate launch` with the shipped configuration leaves the environment of the first process."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true", **REQUIRED}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_shipped_configuration_says_what_the_code_relies_on() -> None:
    config = load_config_from_file(str(CONFIG))
    assert config.distributed_type == "FSDP" and config.mixed_precision == "no"
    said = {name.upper(): str(value) for name, value in config.fsdp_config.items()}
    assert {name: said[name].lower() for name in REQUIRED} == {key: value.lower() for key, value in REQUIRED.items()}


def test_another_configuration_is_refused_value_by_value(
    launched: pytest.MonkeyPatch, model: Path, rows: Path, tmp_path: Path
) -> None:
    launched.setenv("FSDP_USE_ORIG_PARAMS", "true")
    launched.setenv("FSDP_VERSION", "2")
    with pytest.raises(LLMCompressError) as error:
        run(recipe(model, tmp_path / "out", rows), Silent())
    assert "fsdp_version is 2, an adapter needs 1" in str(error.value)
    assert "fsdp_use_orig_params is true, an adapter needs false" in str(error.value)


@pytest.mark.parametrize(("settings", "wanted"), [
    ({"adapter": "adalora"}, "adapter adalora: not under FSDP: it ranks"),
    ({"adapter": "lora", "dora": True}, "dora: not under FSDP: it takes norms"),
    ({"adapter": "qlora", "init": "loftq"}, "init loftq: not under FSDP"),
])  # fmt: skip
def test_what_reads_whole_weights_is_refused(
    settings: dict[str, object], wanted: str, launched: pytest.MonkeyPatch, model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(LLMCompressError, match=wanted):
        run(recipe(model, tmp_path / "out", rows, **settings), Silent())


def test_distillation_is_refused(launched: pytest.MonkeyPatch, model: Path, rows: Path, tmp_path: Path) -> None:
    head = {"model": str(model), "output": str(tmp_path / "out")}
    with pytest.raises(LLMCompressError, match="distill: is not spread over processes by FSDP"):
        run(Recipe.of(head | {"stages": [{"distill": {"data": {"path": str(rows)}, "keep": 0.5}}]}), Silent())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_take_another_name_and_stay_what_they_were(dtype: torch.dtype, double_quant: bool, model: Path) -> None:
    source = Checkpoint.open(model)
    plan = plan_base(source, "nf4", "qlora", double_quant)
    base = load_base(source, plan, str(dtype).removeprefix("torch."))
    before = logits(base)
    bits = {name: value.data.clone() for name, value in base.named_parameters() if value.dtype == torch.uint8}
    assert len(bits) == len(plan.linears)
    view_codes_as(base, dtype, torch.device("cpu"))
    frozen = dict(base.named_parameters())
    assert {value.dtype for value in frozen.values()} == {dtype}
    for name, value in bits.items():
        assert torch.equal(frozen[name].data.view(torch.uint8).flatten(), value.flatten())
    assert torch.equal(logits(base), before)
    shape = lora.Shape(rank=4, alpha=8, dropout=0)
    adapted = lora.attach(base, targets(base, ["all-linear"]), shape, None, 0)
    with lora.muted(adapted):
        assert torch.equal(logits(adapted), before)


def test_a_base_of_two_dtypes_is_refused(model: Path) -> None:
    source = Checkpoint.open(model)
    base = load_base(source, plan_base(source, "nf4", "qlora", False))
    base.get_submodule("model.norm").to(torch.bfloat16)
    with pytest.raises(LLMCompressError, match=r"model\.norm\.weight is torch\.bfloat16 in a base of torch\.float32"):
        view_codes_as(base, torch.float32, torch.device("cpu"))


def test_a_muted_adapter_adds_nothing_and_speaks_again(model: Path) -> None:
    source = Checkpoint.open(model)
    base = load_base(source, plan_base(source, "full", "lora", False))
    before = logits(base)
    shape = lora.Shape(rank=4, alpha=8, dropout=0)
    adapted = lora.attach(base, targets(base, ["all-linear"]), shape, None, 0)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(value)
    loud = logits(adapted)
    with lora.muted(adapted):
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted), loud) and not torch.equal(loud, before)
