"""A plan against what a run then does; and that planning reads no weights and loads no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.planning import plan_quantization
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.compress.targets import GATE
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.run import run
from tests import tiny_models


def planned(folder: Path, **settings: Any) -> Any:
    return plan_quantization(Checkpoint.open(folder), QuantizeSettings(**settings), 1024, 64, 1e10)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "W4A16", "group_size": 32, "format": ["gptq"]},
        {"scheme": "W4A16", "group_size": 32, "format": ["compressed_tensors"], "symmetric": False},
        {"scheme": "W3A16", "group_size": 64, "format": ["compressed_tensors"]},
        {"scheme": "NF4"},
        {"scheme": "NF4-DQ"},
    ],
)
def test_planned_bytes_are_those_of_the_files(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    if name == "gpt2" and "compressed_tensors" in settings.get("format", []):
        pytest.skip("refused there")
    source = tiny_models.save(tmp_path / "source", tiny_models.configs()[name])
    tiny_models.save_tokenizer(source)
    plan = planned(source, method="rtn", **settings)
    stages = [{"quantize": {"method": "rtn", **settings}}]
    report = next(
        iter(
            run(Recipe.of({"model": str(source), "output": str(tmp_path / "out"), "stages": stages}), Silent()).values()
        )
    )
    assert report.output is not None and report.source is not None
    done = [row.name for row in report.linears if row.outcome == "quantized"]
    assert len(plan.linears) == len(done)
    assert plan.parameters == report.source.num_parameters
    assert plan.before_bytes == report.source.weights_bytes
    assert plan.after_bytes == pytest.approx(report.output.weights_bytes, rel=0.01)
    assert plan.bits_per_weight == pytest.approx(report.output.bits_per_weight, rel=0.03)


def test_what_is_skipped_is_named_with_the_reason(tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path, tiny_models.configs()["llama"])
    plan = planned(source, group_size=32, ignore=["*.down_proj"])
    assert plan.skipped["model.layers.1.mlp.down_proj"] == "ignored on request"
    assert plan.skipped["lm_head"] == "outside the decoder layers"
    assert len(plan.linears) == 12


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 48}, "group size 48 does not divide the 64 in_features"),
        ({"group_size": 32, "ignore": ["*.none"]}, r"ignore pattern '\*.none' matches no linear"),
    ],
)
def test_what_would_fail_is_said_before(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path, tiny_models.configs()["llama"])
    with pytest.raises(LLMCompressError, match=said):
        planned(source, **settings)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoe"])
def test_a_mixture_is_planned_by_experts_and_by_what_a_token_goes_through(name: str, tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path, tiny_models.mixtures()[name])
    plan = planned(folder, group_size=32)
    experts = [linear for linear in plan.linears if ".experts." in linear.name]
    assert plan.experts == 4 and len(experts) == 2 * 4 * 3
    idle = sum(linear.out_features * linear.in_features for linear in experts) // 2
    assert plan.active_parameters == plan.parameters - idle, "two of four"
    assert plan.parameters == sum(prod(tensor.shape) for tensor in Checkpoint.open(folder).stored.values())
    assert all(reason == GATE for linear, reason in plan.skipped.items() if linear.endswith(("gate", "router.layer")))


def test_the_command_loads_no_torch_and_takes_under_two_seconds(tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path, tiny_models.configs()["llama"])
    code = """
import atexit, sys, time
from llmcompress.cli.main import main
atexit.register(lambda: print(sorted({"torch", "transformers"} & set(sys.modules)), time.process_time()))
main()
"""
    command = [sys.executable, "-c", code, "plan", str(source), "--group-size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=True)
    loaded, seconds = done.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    assert loaded == "[]" and float(seconds) < 2, done.stdout
    assert "14 to int4 g32 sym" in done.stdout
