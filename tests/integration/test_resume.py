"""A run that is killed at any layer and started again ends in the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.compress import workspace
from llmcompress.report import RunReport

Compress = Callable[..., RunReport]


def killed(model: Path, out: Path, text: Path, layer: int, asymmetric: bool = False) -> None:
    """Quantize in a process of its own that kills itself (SIGKILL) when `layer` has just been finished."""
    script = f"""
        import os, signal
        from llmcompress.compress.workspace import Workspace
        from llmcompress.console import Silent
        from llmcompress.config.recipe import Recipe
        from llmcompress.pipeline.run import run
        finish = Workspace.finish_layer
        def finish_and_die(self, layer, packed, rows):
            finish(self, layer, packed, rows)
            if layer == {layer}:
                os.kill(os.getpid(), signal.SIGKILL)
        Workspace.finish_layer = finish_and_die
        settings = dict(calibration={str(text)!r}, num_samples=16, seq_len=64, batch_tokens=256, group_size=32)
        settings |= dict(asymmetric_calibration=True) if {asymmetric} else dict()
        run(Recipe.of(dict(model={str(model)!r}, output={str(out)!r}, stages=[dict(quantize=settings)])), Silent())
    """
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=dict(os.environ), check=False)
    assert code.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("layer", "asymmetric"), [(0, False), (2, False), (1, True)])
def test_killed_and_started_again_gives_the_same_bytes(
    layer: int, asymmetric: bool, make: Callable[..., Path], compress: Compress, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = make("llama", num_hidden_layers=4)
    asked = {"asymmetric_calibration": True} if asymmetric else {}
    whole = compress(source, tmp_path / "whole", **asked)
    killed(source, tmp_path / "out", tmp_path / "text.txt", layer, asymmetric)
    assert not (tmp_path / "out").exists(), "nothing that looks finished"
    solved: list[int] = []
    finish = workspace.Workspace.finish_layer

    def counted(self: workspace.Workspace, index: int, packed: object, rows: object) -> None:
        solved.append(index)
        finish(self, index, packed, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(workspace.Workspace, "finish_layer", counted)
    resumed = compress(source, tmp_path / "out", **asked)
    assert solved == list(range(layer + 1, 4)), "only the layers that were missing"
    assert resumed.output is not None and whole.output is not None
    assert resumed.output.digests == whole.output.digests
    assert resumed.linears == whole.linears
    assert not list(tmp_path.glob(".out*"))


def test_another_recipe_does_not_continue_this_one(
    make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = make("llama", num_hidden_layers=2)
    killed(source, tmp_path / "out", tmp_path / "text.txt", 0)
    whole = compress(source, tmp_path / "whole", scheme="W8A16")
    assert compress(source, tmp_path / "out", scheme="W8A16").output.digests == whole.output.digests  # type: ignore[union-attr]
