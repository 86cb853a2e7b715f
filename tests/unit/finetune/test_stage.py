"""Fine-tuning: every kind of adapter trains, plain PEFT loads it, and what is impossible is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.finetune import lora
from llmcompress.finetune.base import load_base, plan_base
from llmcompress.finetune.lora import Budget
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from tests import tiny_models
from tests.unit.finetune.conftest import Finetune, logits, recipe

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora"},
    "qlora": {"adapter": "qlora"},
    "double quant": {"adapter": "qlora", "double_quant": True},
    "dora": {"adapter": "lora", "dora": True},
    "rslora": {"adapter": "lora", "rslora": True},
    "adalora": {"adapter": "adalora"},
    "adalora on nf4": {"adapter": "adalora", "base": "nf4"},
    "loftq": {"adapter": "qlora", "init": "loftq"},
    "residual with dora": {"adapter": "qlora", "init": "residual", "dora": True},
    "some linears": {"adapter": "lora", "target_modules": ["*.layers.1.*.q_proj", "down_proj"]},
    "packed": {"adapter": "lora", "data": {"packing": True}},
    "checkpointed": {"adapter": "lora", "training": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_it_learns_and_plain_peft_loads_it(
    settings: dict[str, Any], finetune: Finetune, model: Path, tmp_path: Path
) -> None:
    report = finetune(**settings)
    part = report.finetune
    assert part is not None and part.heldout_loss is not None and part.heldout_loss_base is not None
    assert part.heldout_loss < part.heldout_loss_base
    assert len(part.training.curve) == part.training.steps == 12
    assert all(check.passed for check in report.checks) and report.checks
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=bool(settings.get("double_quant")),
        bnb_4bit_compute_dtype=torch.float32,
    )
    nf4 = part.base_weights == "nf4"
    base = AutoModelForCausalLM.from_pretrained(model, **({"quantization_config": four_bit} if nf4 else {}))
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter")
    source = Checkpoint.open(model)
    plan = plan_base(source, "nf4" if nf4 else "auto", "lora", bool(settings.get("double_quant")))
    ours = logits(lora.load(load_base(source, plan), [(tmp_path / "adapter", 1.0)]))
    # in training mode bitsandbytes computes what it trained on; evaluated, it may round to bfloat16 on the way
    scale = float(ours.abs().max())
    assert float((logits(plain, training=True) - ours).abs().max()) <= 1e-5 * scale
    if not (nf4 and part.dora):  # where PEFT reads weights that bitsandbytes has repacked; the report says so
        assert float((logits(plain) - ours).abs().max()) <= (5e-2 if nf4 else 1e-5) * scale
    assert any("support_avx512bf16_for_cpu" in note for note in report.notes) == (nf4 and part.dora)


def test_the_same_seed_gives_the_same_bytes(finetune: Finetune, tmp_path: Path) -> None:
    first, second = finetune("a", adapter="qlora"), finetune("b", adapter="qlora")
    assert first.output is not None and second.output is not None
    assert first.output.digests == second.output.digests


def test_adalora_reaches_its_budget_and_says_where_the_rank_went(finetune: Finetune, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    report = finetune(adapter="adalora", rank=4, adalora={"initial_rank": 8}, training={"max_steps": 30})
    part = report.finetune
    assert part is not None and part.initial_rank == 8
    ranks = {one.name: one.rank for one in part.modules}
    assert sum(ranks.values()) == 4 * len(ranks) and len(set(ranks.values())) > 1
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, rank in ranks.items():
        assert stored[f"base_model.model.{name}.lora_A"].shape[0] == rank
    assert next(check for check in report.checks if check.name == "rank budget").passed


def test_adalora_in_two_batches_a_step_is_adalora_in_one(finetune: Finetune, tmp_path: Path) -> None:
    """PEFT adds its orthogonality term to every batch's loss: it must count once a step, however many there are."""
    whole = finetune("whole", adapter="adalora", training={"batch_size": 4}).finetune
    parts = finetune("parts", adapter="adalora", training={"batch_size": 2, "accumulation": 2}).finetune
    assert whole is not None and parts is not None
    found, wanted = ([point.loss for point in one.training.curve] for one in (parts, whole))
    assert found == pytest.approx(wanted, rel=1e-4)
    for out in ("whole", "parts"):
        config = json.loads((tmp_path / out / "adapter_config.json").read_text())
        assert config["orth_reg_weight"] == 0.5, "what was asked for"


def test_without_the_driver_the_ranks_do_not_fall(finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora.AdaLoraDriver, "step", lambda self, step: None)
    check = next(check for check in finetune(adapter="adalora").checks if check.name == "rank budget")
    assert not check.passed and "average rank 6.000" in check.detail


@pytest.mark.parametrize("adapter", ["lora", "adalora"])
def test_a_stopped_run_goes_on_with_the_same_losses(
    adapter: str, model: Path, rows: Path, finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.training import trainer

    settings: dict[str, Any] = {"adapter": adapter, "dropout": 0.1, "training": {"max_steps": 20, "save_every": 3}}
    whole = finetune("whole", **settings)
    step = trainer._Trainer.training_step
    calls = iter(range(100))

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 13:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer._Trainer, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune("parts", **settings)
    monkeypatch.setattr(trainer._Trainer, "training_step", step)
    parts = finetune("parts", **settings)
    assert whole.finetune is not None and parts.finetune is not None
    assert parts.finetune.training.resumed_from == 12
    assert parts.finetune.training.curve == whole.finetune.training.curve
    assert parts.output is not None and whole.output is not None
    assert parts.output.digests["adapter_model.safetensors"] == whole.output.digests["adapter_model.safetensors"]


def test_a_loss_that_is_no_number_ends_with_advice_and_the_last_good_adapter(
    finetune: Finetune, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.training import trainer

    compute = trainer._Trainer.compute_loss
    seen = iter(range(100))

    def nan_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if next(seen) == 7 else loss

    monkeypatch.setattr(trainer._Trainer, "compute_loss", nan_loss)
    with pytest.raises(LLMCompressError, match="the loss is not finite after step 7") as caught:
        finetune(training={"save_every": 3})
    assert "lower --learning-rate" in str(caught.value.hint) and "step 6" in caught.value.message
    kept = tmp_path / "adapter.last-good"
    assert torch.isfinite(logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), kept))).all()
    assert not (tmp_path / "adapter").exists()


def test_memory_that_ran_out_ends_with_advice(finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompress.training import trainer

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(trainer._Trainer, "compute_loss", full)
    with pytest.raises(LLMCompressError, match="out of memory with batch_size 4") as caught:
        finetune()
    assert "--batch-size 2" in str(caught.value.hint) and "qlora" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank: input should be greater than or equal to 1"),
        ({"target_modules": ["*.q_porj"]}, "'*.q_porj' matches no linear"),
        ({"adapter": "qlora", "base": "full"}, "qlora trains on a base of base: nf4"),
        ({"adapter": "adalora", "dora": True}, "adalora goes with neither dora"),
        ({"adapter": "adalora", "training": {"max_steps": 3}}, "3 optimizer steps are too few"),
        ({"adapter": "adalora", "adalora": {"initial_rank": 4}}, "initial_rank 4 is not above rank 4"),
        ({"adapter": "lora", "init": "loftq"}, "the base is in full precision, so nothing was lost"),
        ({"data": {"path": "nowhere.jsonl"}}, "nowhere.jsonl: no such file"),
        ({"data": {"seq_len": 4}}, "no usable row"),
        ({"data": {"seq_len": 999}}, "takes at most 128 positions"),
        ({"data": {"kind": "chat"}}, "asks for a chat template"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    settings: dict[str, Any], said: str, finetune: Finetune, tmp_path: Path
) -> None:
    with pytest.raises(LLMCompressError) as caught:
        finetune(**settings)
    assert said in "\n".join(caught.value.lines())
    assert not (tmp_path / "adapter").exists()


def test_a_gptq_base_is_refused_with_the_way_out(finetune: Finetune, model: Path, rows: Path, tmp_path: Path) -> None:
    from llmcompress.config.recipe import Recipe

    quantize = {"quantize": {"method": "rtn", "group_size": 32}}
    small = tmp_path / "gptq"
    run(Recipe.of({"model": str(model), "output": str(small), "stages": [quantize]}), Silent())
    with pytest.raises(LLMCompressError, match="is quantized already") as caught:
        finetune(source=small)
    assert "merge ADAPTER --then quantize" in str(caught.value.hint)


def test_a_calibrated_nf4_checkpoint_of_ours_is_a_base(model: Path, rows: Path, tmp_path: Path) -> None:
    """In one recipe: quantize, fine-tune on the codes, merge onto what they stand for."""
    from llmcompress.config.recipe import Recipe

    text = tmp_path / "text.txt"
    text.write_text(tiny_models.words(3000))
    settings = {"scheme": "NF4", "method": "gptq", "calibration": str(text), "num_samples": 4, "seq_len": 32}
    nf4 = tmp_path / "nf4"
    run(Recipe.of({"model": str(model), "output": str(nf4), "stages": [{"quantize": settings}]}), Silent())
    out = tmp_path / "merged"
    report = run(recipe(nf4, out, rows, {"merge": {}}, adapter="qlora"), Silent())[out]
    assert report.finetune is not None and report.finetune.base_weights == "stored nf4"
    assert report.merge is not None and report.merge.onto == "dequantized"
    assert report.merge.kl_dequantized is not None and report.merge.kl_dequantized < 1e-8
    assert isinstance(RunReport.load(out).output, type(report.output))


def test_budget_is_made_for_the_real_number_of_steps() -> None:
    budget = Budget.of(8, None, 0.1, 0.3, 200, 0.5, 1)
    assert (budget.initial, budget.warmup, budget.final, budget.total) == (12, 20, 60, 200)
    assert Budget.of(8, None, 0.0, 0.0, 10, 0.5, 1).final == 1  # the last cut needs a step of its own
