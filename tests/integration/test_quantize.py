"""From a checkpoint folder to a compressed one, over architectures, formats and independent readers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.compress.dequantized import load_dequantized
from llmcompress.errors import LLMCompressError
from llmcompress.report import RunReport
from tests import tiny_models

Compress = Callable[..., RunReport]
TOKENS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(7))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()  # type: ignore[no-any-return]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("name", tiny_models.configs())
def test_every_architecture_goes_through_gptq_and_reads_back(
    name: str, make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = make(name)
    report = compress(source, scheme="W8A16", format=["gptq"])
    done = [row for row in report.linears if row.outcome == "quantized"]
    assert len(done) == 2 * {"gpt2": 4, "opt": 6, "gpt_neox": 4, "phi": 6}.get(name, 7)
    assert all(row.relative_error is not None and row.relative_error < 1e-3 for row in done)
    assert all(row.num_tokens == 16 * 64 for row in done)
    before, after = logits(load(source)), logits(load_dequantized(tmp_path / "out"))
    assert float((before - after).norm() / before.norm()) < 0.05
    assert not list(tmp_path.glob(".out*")), "no scratch is left"


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [*((name, True) for name in tiny_models.configs() if name != "gpt2"), ("llama", False), ("qwen2", False)],
)
def test_transformers_reads_compressed_tensors_as_we_do(
    name: str, symmetric: bool, make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    compress(make(name), method="rtn", format=["compressed_tensors"], symmetric=symmetric)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load_dequantized(tmp_path / "out")))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "phi"])
@pytest.mark.parametrize("scheme", ["NF4", "NF4-DQ"])
def test_bitsandbytes_reads_calibrated_nf4_as_we_do(
    name: str, scheme: str, make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    compress(make(name), scheme=scheme)
    model = load(tmp_path / "out")
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds
    ours, theirs = logits(load_dequantized(tmp_path / "out")), logits(model)
    assert float((ours - theirs).norm() / ours.norm()) < 2e-2, "bitsandbytes' kernel computes in bfloat16"


def test_one_result_in_two_layouts_is_the_same_weights(
    make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    compress(make("llama"), format=["gptq", "compressed_tensors"])
    both = [RunReport.load(tmp_path / "out" / name) for name in ("gptq", "compressed_tensors")]
    assert [row.digest for row in both[0].linears] == [row.digest for row in both[1].linears]
    one, two = (load_dequantized(tmp_path / "out" / name) for name in ("gptq", "compressed_tensors"))
    assert torch.equal(logits(one), logits(two))


def test_what_is_not_quantized_is_copied_byte_for_byte(
    make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    from llmcompress.checkpoint.reader import Checkpoint

    source = make("llama-tied", max_shard_size="100KB")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    compress(source, method="rtn", ignore=["*.down_proj"])
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    kept = set(before.names()) & set(after.names())
    assert any("down_proj.weight" in name for name in kept) and any("norm" in name for name in kept)
    assert not any(name.endswith("up_proj.weight") for name in after.names())
    assert "lm_head.weight" not in after.names(), "tied embeddings stay tied"
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in kept)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    report = RunReport.load(tmp_path / "out")
    reasons = {row.name: row.reason for row in report.linears if row.outcome == "skipped"}
    assert reasons["lm_head"] == "outside the decoder layers"
    assert reasons["model.layers.0.mlp.down_proj"] == "ignored on request"


def test_the_same_run_twice_gives_the_same_bytes(make: Callable[..., Path], compress: Compress, tmp_path: Path) -> None:
    source = make("llama")
    digests = [compress(source, tmp_path / f"out{i}").output.digests for i in range(2)]  # type: ignore[union-attr]
    assert digests[0] == digests[1]
    path = tmp_path / "out0" / "model.safetensors"
    assert digests[0][path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2"])
def test_without_memory_for_activations_the_result_is_the_same(
    name: str, make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = make(name)
    whole = compress(source, tmp_path / "whole", format=["gptq"])
    small = compress(source, tmp_path / "small", format=["gptq"], activation_memory_mb=0)
    assert whole.profile is not None and small.profile is not None
    assert (whole.profile.schedule, whole.profile.activations, whole.profile.reason) == ("staged", "memory", None)
    assert (small.profile.schedule, small.profile.activations) == ("recomputed", "disk")
    assert small.profile.reason is not None and "activation_memory_mb" in small.profile.reason
    assert [row.digest for row in small.linears] == [row.digest for row in whole.linears]
    assert small.profile.flops == whole.profile.flops, "what the work needs at least does not depend on how it is done"


def test_the_report_counts_what_the_work_needs(make: Callable[..., Path], compress: Compress) -> None:
    work = compress(make("llama")).profile
    assert work is not None
    tokens, shapes = 16 * 64, {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (128, 64)}
    shapes |= {"up": (128, 64), "down": (64, 128)}
    weights = sum(rows * width for rows, width in shapes.values())
    assert work.flops["forward"] == 2 * 2 * weights * tokens
    assert work.flops["hessian"] == 2 * tokens * (3 * 64**2 + 128**2), "four Hessians a layer, a triangle each"
    codes = sum(rows * width**2 for rows, width in shapes.values())
    assert work.flops["solving"] == pytest.approx(2 * (codes + (3 * 64**3 + 128**3) / 3))
    assert {"forward", "hessian", "solving", "reading", "packing", "writing"} <= set(work.seconds)


def test_overrides_give_some_linears_another_grid(
    make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    report = compress(
        make("llama"),
        format=["compressed_tensors"],
        overrides=[{"pattern": "*.down_proj", "scheme": "W8A16", "group_size": 64}],
    )
    labels = {row.name.rsplit(".", 1)[-1]: row.scheme for row in report.linears}
    assert labels["down_proj"] == "int8 g64 sym" and labels["up_proj"] == "int4 g32 sym"
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load_dequantized(tmp_path / "out")))


def test_gptq_layout_says_what_engines_read(make: Callable[..., Path], compress: Compress, tmp_path: Path) -> None:
    compress(make("llama"), format=["gptq"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 32)
    assert (config["sym"], config["desc_act"], config["checkpoint_format"]) == (True, False, "gptq")
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config


def test_padding_of_chat_rows_is_kept_out(make: Callable[..., Path], compress: Compress, tmp_path: Path) -> None:
    source = make("llama")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [{"messages": [{"role": "user", "content": tiny_models.words(10 + 5 * i, i)}]} for i in range(8)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "chat.yaml").write_text(
        "name: chat\ndescription: talk\ntext: chat.jsonl\nfield: messages\nchat_template: true\n"
    )
    report = compress(source, calibration=str(tmp_path / "chat.yaml"), num_samples=8)
    real = sum(min(64, 10 + 5 * i) for i in range(8))
    assert report.calibration is not None and report.calibration.num_tokens == pytest.approx(real, abs=16)
    tokens = {row.num_tokens for row in report.linears if row.outcome == "quantized"}
    assert tokens == {report.calibration.num_tokens}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 48}, "group size 48 does not divide the 64 in_features of model.layers.0.self_attn.q_proj"),
        ({"ignore": ["*.no_such"]}, r"ignore pattern '\*.no_such' matches no linear"),
        ({"overrides": [{"pattern": "x*", "scheme": "W8A16"}]}, r"override pattern 'x\*' matches no linear"),
        ({"ignore": ["*"]}, "no linear is left to quantize"),
        ({"scheme": "W3A16", "format": ["gptq"]}, "format gptq"),
        ({"symmetric": False, "format": ["gptq"]}, "format gptq"),
        ({"scheme": "NF4", "group_size": None, "format": ["compressed_tensors"]}, "format compressed_tensors"),
        ({"format": ["bitsandbytes"]}, "format bitsandbytes"),
        ({"scheme": "W4A61"}, "unknown scheme 'W4A61'"),
        ({"method": "gtpq"}, "unknown method 'gtpq'"),
        ({"format": ["gguf2"]}, "unknown format 'gguf2'"),
        ({"calibration": "tinny"}, "unknown calibration set 'tinny'"),
        ({"method_settings": {"dampening_frac": 2.0}}, "dampening_frac"),
        ({"method_settings": {"damp": 0.1}}, "damp"),
        ({"num_samples": 5000}, "5000"),
        ({"seq_len": 4096}, "4096"),
    ],
)
def test_bad_settings_are_one_clear_error_and_leave_nothing(
    settings: dict[str, Any], said: str, make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    with pytest.raises(LLMCompressError, match=said):
        compress(make("llama"), **settings)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_gpt2_is_refused_in_the_layout_that_cannot_hold_it(make: Callable[..., Path], compress: Compress) -> None:
    with pytest.raises(LLMCompressError, match="Conv1D"):
        compress(make("gpt2"), format=["compressed_tensors"])


def test_a_quantized_checkpoint_is_not_quantized_again(
    make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    compress(make("llama"), method="rtn")
    with pytest.raises(LLMCompressError, match="is quantized already"):
        compress(tmp_path / "out", tmp_path / "again")


def test_a_failing_linear_is_named_and_falls_back_only_on_request(
    make: Callable[..., Path], compress: Compress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmcompress.compress.statistics import HessianSum

    def spoiled(self: HessianSum) -> tuple[torch.Tensor, int]:
        hessian, count = mean(self)
        return (hessian * float("nan") if hessian.shape[0] == 128 else hessian), count

    mean = HessianSum.mean
    monkeypatch.setattr(HessianSum, "mean", spoiled)
    source = make("llama")
    with pytest.raises(LLMCompressError, match=r"model.layers.0.mlp.down_proj: its Hessian is not finite"):
        compress(source)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    report = compress(source, on_failure="rtn")
    fallen = [row for row in report.linears if row.outcome == "fell_back"]
    assert [row.name for row in fallen] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert all(row.method == "rtn" and row.reason == "its Hessian is not finite" for row in fallen)


@pytest.mark.parametrize("scheme", ["W2A16", "NF4-DQ"])
def test_asymmetric_calibration_never_ends_above_the_plain_method(
    scheme: str, make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = make("llama", num_hidden_layers=3)
    asked = {"scheme": scheme, "num_samples": 32, "group_size": None if scheme == "NF4-DQ" else 32}
    without = compress(source, tmp_path / "without", **asked)
    report = compress(source, tmp_path / "out", asymmetric_calibration=True, **asked)
    rows = [row for row in report.linears if row.outcome == "quantized"]
    assert report.profile is not None and report.profile.num_worse == 0
    assert all((row.held_out_error or 0) <= (row.plain_held_out_error or 0) for row in rows)
    assert {row.solution for row in rows} > {"refined"}, "aimed at least once, and in the first layer's q, k, v never"
    assert rows[0].solution == "refined" and rows[0].digest == without.linears[0].digest, "nothing is spoiled before it"


def test_effort_max_is_kept_only_where_it_is_closer(
    make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = make("llama")
    plain = compress(source, tmp_path / "plain", scheme="W2A16", num_samples=32)
    asked: dict[str, Any] = {"effort": "max", "asymmetric_calibration": False, "tune_steps": 20}
    tuned = compress(source, tmp_path / "tuned", scheme="W2A16", num_samples=32, **asked)
    assert plain.tuning is None and tuned.tuning is not None
    done = tuned.tuning
    assert done.kept == (done.held_out_kl_after < done.held_out_kl_before)
    assert done.num_held_out_tokens == 2 * 64
    assert done.num_codes == sum(row.shape[0] * row.shape[1] for row in tuned.linears if row.outcome == "quantized")
    changed = [a.name for a, b in zip(plain.linears, tuned.linears, strict=True) if a.digest != b.digest]
    assert bool(changed) == done.kept and done.kept
    assert all("tuned end to end" in row.notes[0] for row in tuned.linears if row.outcome == "quantized")
    torch.testing.assert_close(logits(load(tmp_path / "tuned")), logits(load_dequantized(tmp_path / "tuned")))
    before, after = (load_dequantized(tmp_path / name) for name in ("plain", "tuned"))
    original = logits(load(source)).log_softmax(-1)
    kl = [float((original.exp() * (original - logits(m).log_softmax(-1))).sum(-1).mean()) for m in (before, after)]
    assert kl[1] < kl[0]


def test_effort_max_killed_while_it_packs_ends_in_the_same_bytes(
    make: Callable[..., Path], compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.compress.workspace import Workspace

    source, asked = make("llama"), {"scheme": "W2A16", "effort": "max", "tune_steps": 10}
    whole = compress(source, tmp_path / "whole", **asked)
    finish = Workspace.finish_layer

    def stopped(self: Workspace, layer: int, packed: Any, rows: Any, tuned: bool = False) -> None:
        finish(self, layer, packed, rows, tuned)
        if tuned:
            raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "finish_layer", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", **asked)
    monkeypatch.undo()
    assert list(tmp_path.glob(".out.partial/tuned-00000.*"))
    resumed = compress(source, tmp_path / "out", **asked)
    assert resumed.output is not None and whole.output is not None
    assert resumed.output.digests == whole.output.digests


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"effort": "max", "num_samples": 8}, "effort max: needs 16 rows"),
        ({"effort": "max", "method": "rtn"}, "effort max: method rtn reads no calibration text"),
        ({"asymmetric_calibration": True, "method": "rtn"}, "asymmetric_calibration: method rtn reads no"),
        ({"asymmetric_calibration": True, "activation_memory_mb": 0}, "activations of both models take 2 MiB, over"),
    ],
)
def test_what_needs_text_or_memory_says_so(
    settings: dict[str, Any], said: str, make: Callable[..., Path], compress: Compress
) -> None:
    with pytest.raises(LLMCompressError, match=said):
        compress(make("llama"), **settings)
