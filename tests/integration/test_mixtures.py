"""Mixtures of experts from checkpoint to checkpoint, over architectures, held against transformers' own fused forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.dequantized import load_dequantized
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.models import meta
from llmcompress.models.experts import SplitExperts, sliced, unread
from llmcompress.report import RunReport
from llmcompress.verify.check import check
from llmcompress.verify.settings import CheckSettings, VerifySettings
from llmcompress.verify.stage import verify
from tests import tiny_models
from tests.integration.test_quantize import load, logits

Compress = Callable[..., RunReport]
FUSED_ON_DISK = ("granitemoe",)


@pytest.fixture
def mixture(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **kwargs: Any) -> Path:
        folder = tiny_models.save(tmp_path / name, tiny_models.mixtures()[name], **kwargs)
        tiny_models.save_tokenizer(folder)
        (tmp_path / "text.txt").write_text(tiny_models.words(3000))
        return folder

    return make


@pytest.mark.parametrize("name", tiny_models.mixtures())
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_mixture_is_quantized_expert_by_expert_and_reads_back(
    name: str, method: str, mixture: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    report = compress(mixture(name), method=method, format=["compressed_tensors"])
    experts = [row for row in report.linears if ".experts." in row.name]
    assert experts and all(row.outcome == "quantized" for row in experts), "none is left as it was"
    assert len(experts) % 12 == 0, "four experts of three linears"
    assert all((row.num_routed_tokens is not None) == (method == "gptq") for row in experts)
    gates = [row for row in report.linears if row.name.rpartition(".")[2].endswith("gate")]
    assert all(row.outcome == "skipped" for row in gates)
    stored = Checkpoint.open(tmp_path / "out").names()
    assert not [name for name in stored if "experts" in name and name.endswith((".weight", "_proj"))]
    ours = logits(load_dequantized(tmp_path / "out"))
    reason = unread(Checkpoint.open(tmp_path / "out"))
    verdict = next(v for v in check(tmp_path / "out", CheckSettings(engine="transformers")))
    if name in FUSED_ON_DISK:
        assert reason is not None and "no rule that stacks" in reason and verdict.loads is False
    else:
        assert reason is None and verdict.loads is True
        torch.testing.assert_close(logits(load(tmp_path / "out")), ours)


@pytest.mark.parametrize("name", tiny_models.mixtures())
def test_experts_taken_apart_compute_what_transformers_fused_ones_do(name: str, mixture: Callable[..., Path]) -> None:
    source = Checkpoint.open(mixture(name))
    model = meta.build(source)
    assert any(isinstance(module, SplitExperts) for module in model.modules())
    source = sliced(source, model)
    for parameter, tensor in meta.tensor_names(model, source).items():
        meta.set_parameter(model, parameter, source.tensor(tensor).float())
    model.tie_weights()
    ours, theirs = logits(model), logits(load(source.folder))
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_the_gptq_layout_holds_experts_and_says_that_transformers_does_not_read_them(
    mixture: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    compress(mixture("qwen3_moe"), format=["gptq", "compressed_tensors"], stages=[{"verify": {}}])
    one, two = (load_dequantized(tmp_path / "out" / name) for name in ("gptq", "compressed_tensors"))
    assert torch.equal(logits(one), logits(two))
    checkpoint = Checkpoint.open(tmp_path / "out" / "gptq")
    assert "model.layers.1.mlp.experts.3.up_proj.qweight" in checkpoint.names()
    assert "replaces linears alone" in str(unread(checkpoint))
    checks = RunReport.load(tmp_path / "out" / "compressed_tensors").checks
    assert checks and all(each.passed for each in checks), [each for each in checks if not each.passed]
    assert next(each for each in checks if each.name == "engine").ran


def test_a_mixture_that_is_stored_fused_passes_every_check_that_can_be_run(
    mixture: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    report = compress(mixture("granitemoe"), ignore=["*.experts.1.*"], method="rtn", format=["compressed_tensors"])
    assert sum("ignored" in str(row.reason) for row in report.linears) == 6
    done = verify(tmp_path / "out", VerifySettings(), progress=Silent())
    assert all(each.passed for each in done), [each for each in done if not each.passed]
    engine = next(each for each in done if each.name == "engine")
    assert not engine.ran and "no rule that stacks" in engine.detail


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scheme": "NF4"}, "is an expert, and transformers holds a layer's experts in one tensor"),
        ({"symmetric": False, "format": ["compressed_tensors"]}, "no zero points of a mixture's experts"),
        (
            {
                "overrides": [{"pattern": "*.experts.1.*", "scheme": "W8A16", "group_size": 32}],
                "format": ["compressed_tensors"],
            },
            "one scheme",
        ),
    ],
)
def test_what_no_reader_takes_of_experts_is_refused_before_any_work(
    settings: dict[str, Any], said: str, mixture: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    with pytest.raises(LLMCompressError, match=said):
        compress(mixture("mixtral"), method="rtn", **settings)
    assert not (tmp_path / "out").exists()


def test_nf4_of_a_mixture_without_its_experts_loads_in_bitsandbytes(
    mixture: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    compress(mixture("qwen3_moe"), scheme="NF4", ignore=["*.experts.*"])
    ours, theirs = logits(load_dequantized(tmp_path / "out")), logits(load(tmp_path / "out"))
    assert float((ours - theirs).norm() / ours.norm()) < 0.1, (
        "the kernel computes in bfloat16, which moves some routing"
    )


def test_an_expert_that_few_tokens_reach_is_solved_on_others_too_and_says_so(
    mixture: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = mixture("qwen3_moe")
    every = compress(source, expert_tokens=0)
    routed = {row.name: row for row in every.linears if row.num_routed_tokens is not None}
    per_layer = sum(row.num_routed_tokens or 0 for name, row in routed.items() if "layers.0" in name and "gate" in name)
    assert per_layer == 2 * 16 * 64, "each token reaches two experts"
    floor = sorted(row.num_routed_tokens or 0 for row in routed.values())[len(routed) // 2]
    report = compress(source, tmp_path / "floor", expert_tokens=floor)
    for row in (row for row in report.linears if row.num_routed_tokens is not None and "layers.0" in row.name):
        assert row.num_routed_tokens == routed[row.name].num_routed_tokens, "the forward's routing is as it was"
        assert (row.num_tokens or 0) >= floor
        few = (row.num_routed_tokens or 0) < floor
        assert bool(row.notes) == few and ((row.num_tokens or 0) > (row.num_routed_tokens or 0)) == few
        if not few and "gate" in row.name:
            assert row.digest == routed[row.name].digest, "an expert with enough tokens is solved on them alone"


def test_staged_and_recomputed_give_the_same_experts(
    mixture: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = mixture("olmoe")
    staged = compress(source, expert_tokens=600)
    recomputed = compress(source, tmp_path / "again", expert_tokens=600, activation_memory_mb=0)
    assert recomputed.profile is not None and recomputed.profile.schedule == "recomputed"
    assert [row.digest for row in staged.linears] == [row.digest for row in recomputed.linears]


def test_asymmetric_calibration_and_tuning_take_a_mixture(
    mixture: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    report = compress(mixture("qwen2_moe"), effort="max", tune_steps=2)
    assert report.tuning is not None
    assert {row.solution for row in report.linears if ".experts." in row.name} <= {"plain", "refined"}


@pytest.mark.parametrize("name", tiny_models.refused_mixtures())
def test_experts_in_a_form_of_their_own_are_refused_by_name(name: str, compress: Compress, tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path / name, tiny_models.refused_mixtures()[name])
    tiny_models.save_tokenizer(source)
    with pytest.raises(LLMCompressError, match="experts"):
        compress(source, method="rtn")
    assert not (tmp_path / "out").exists()
