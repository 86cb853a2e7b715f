"""Resident memory does not grow with the depth of the model, and is about what `plan` says."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.quantize.planning import plan_quantization
from llmcompress.quantize.settings import QuantizeSettings
from tests import tiny_models

WIDTH = 512
SHALLOW, DEEP = 12, 30
"""Both deep enough that reading, solving and writing overlap fully: with fewer layers that is not reached."""


def peak_bytes(model: Path, out: Path) -> int:
    """Peak of a process that does nothing but quantize."""
    script = f"""
        from llmcompress.environment import peak_memory_bytes
        from llmcompress.progress import Silent
        from llmcompress.recipe import Recipe
        from llmcompress.run import run
        run(Recipe.of(dict(model={str(model)!r}, output={str(out)!r}, stages=[dict(quantize=dict(method="rtn"))])), Silent())
        print("peak", peak_memory_bytes())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    found = re.search(r"peak (\d+)", done.stdout)
    assert found
    return int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's high-water mark")
def test_peak_memory_does_not_follow_the_number_of_layers(tmp_path: Path) -> None:
    config = tiny_models.configs()["llama"]
    config.hidden_size, config.intermediate_size, config.head_dim = WIDTH, 2 * WIDTH, WIDTH // 4
    config.num_key_value_heads = 4
    peaks, sizes = [], []
    for depth in (SHALLOW, DEEP):
        config.num_hidden_layers = depth
        folder = tiny_models.save(tmp_path / f"model-{depth}", config)
        tiny_models.save_tokenizer(folder)
        sizes.append(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
        peaks.append(peak_bytes(folder, tmp_path / f"out-{depth}"))
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0]), (peaks, sizes)
    plan = plan_quantization(Checkpoint.open(folder), QuantizeSettings(method="rtn"), 0, 1, 1e10)
    assert 0.75 * peaks[1] < plan.peak_memory_bytes < 1.25 * peaks[1], (plan.peak_memory_bytes, peaks)
