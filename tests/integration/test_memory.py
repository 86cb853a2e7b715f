"""Resident memory does not grow with the depth of the model."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import tiny_models

WIDTH = 512
SHALLOW, DEEP = 12, 30
"""Both deep enough that reading, solving and writing overlap fully: with fewer layers that is not reached."""


def peak_bytes(model: Path, out: Path, settings: dict[str, object]) -> int:
    """Highest memory of its own (RssAnon, looked at every few milliseconds) of a process that does nothing but quantize.

    Pages of libraries, which the system drops and fetches as it likes, are not counted: they alone moved by 50 MiB.
    """
    script = f"""
        import re, threading, time
        from llmcompress.memory import managed
        start = managed()
        start.__enter__()  # as the command does before it imports anything else
        from llmcompress.console import Silent
        from llmcompress.config.recipe import Recipe
        from llmcompress.pipeline.run import run
        peak, done = 0, threading.Event()
        def look():
            global peak
            while not done.wait(0.003):
                peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
        watch = threading.Thread(target=look)
        watch.start()
        try:
            run(Recipe.of(dict(model={str(model)!r}, output={str(out)!r}, stages=[dict(quantize={settings!r})])), Silent())
        finally:
            done.set()
            watch.join()
        print("peak", peak)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    found = re.search(r"peak (\d+)", done.stdout)
    assert found
    return int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of memory")
@pytest.mark.parametrize("method", ["rtn", pytest.param("gptq", marks=pytest.mark.slow)])
def test_peak_memory_does_not_follow_the_number_of_layers(tmp_path: Path, method: str) -> None:
    settings: dict[str, object] = {"method": method}
    if method == "gptq":
        (tmp_path / "text.txt").write_text(tiny_models.words(3000))
        settings |= {"calibration": str(tmp_path / "text.txt"), "num_samples": 16, "seq_len": 64}
    config = tiny_models.configs()["llama"]
    config.hidden_size, config.intermediate_size, config.head_dim = WIDTH, 2 * WIDTH, WIDTH // 4
    config.num_key_value_heads = 4
    peaks, sizes = [], []
    for depth in (SHALLOW, DEEP):
        config.num_hidden_layers = depth
        folder = tiny_models.save(tmp_path / f"model-{depth}", config)
        tiny_models.save_tokenizer(folder)
        sizes.append(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
        peaks.append(peak_bytes(folder, tmp_path / f"out-{depth}", settings))
    assert peaks[1] - peaks[0] < 0.2 * (sizes[1] - sizes[0]), (peaks, sizes)
