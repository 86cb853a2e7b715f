"""Two processes quantize together: the same result on every run, close to one process's, and a death loses a layer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.report import RunReport

Compress = Callable[..., RunReport]
ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "0"]
"""torchrun underneath, which needs no GPU; `--cpu` would start one process."""
DYING = """
import os, signal
from llmcompress.__main__ import main
from llmcompress.compress.block_solver import LayerSolver
solve, count = LayerSolver.solve, [0]
def solve_or_die(self, names):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    solve(self, names)
LayerSolver.solve = solve_or_die
main()
"""


def together(recipe: Path, launcher: list[str] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    """Run a recipe in two processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "llmcompress", "run", str(recipe)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def without_launcher(recipe: Path, script: Path) -> tuple[int, str]:
    """Both processes started by hand, so that nobody stops process 0 when 1 is gone; its exit code and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, str(script), "run", str(recipe)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    _, said = started[0].communicate(timeout=240)
    started[1].communicate(timeout=240)
    return started[0].returncode, said


def test_two_processes_do_what_one_does_and_survive_a_death(
    make: Callable[..., Path], compress: Compress, tmp_path: Path
) -> None:
    source = make("llama", num_hidden_layers=3)
    alone = compress(source, tmp_path / "alone")
    settings = {"calibration": str(tmp_path / "text.txt"), "num_samples": 16, "seq_len": 64, "batch_tokens": 256}

    def recipe(out: str) -> Path:
        path = tmp_path / f"{out}.yaml"
        stages = [{"quantize": settings | {"group_size": 32}}]
        path.write_text(json.dumps({"model": str(source), "output": str(tmp_path / out), "stages": stages}))
        return path

    whole = together(recipe("whole"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    report = RunReport.load(tmp_path / "whole")
    assert report.profile is not None and report.profile.num_processes == 2
    for one, both in zip(alone.linears, report.linears, strict=True):
        assert one.name == both.name and one.num_tokens == both.num_tokens
        if one.relative_error is not None and both.relative_error is not None:
            assert abs(one.relative_error - both.relative_error) <= 1e-3

    script = tmp_path / "dying.py"
    script.write_text(DYING)
    died, said = without_launcher(recipe("killed"), script)
    assert died == 2 and not (tmp_path / "killed").exists()
    assert "error: process 1 is gone" in said and "Traceback" not in said, said[-3000:]
    assert (tmp_path / ".killed.partial" / "layer-00000.json").is_file(), "what was finished is kept"

    resumed = together(recipe("killed"), ACCELERATE)
    assert resumed.returncode == 0 and "resuming: 1 of 3 decoder layers are done" in resumed.stderr
    again = RunReport.load(tmp_path / "killed")
    assert again.output is not None and report.output is not None
    assert again.output.digests == report.output.digests, "the same bits on every run"
    assert again.linears == report.linears


def test_nested_scales_are_solved_linear_by_linear(tmp_path: Path) -> None:
    """Rows cut and joined again are the rows; with scales in common, whole linears go to the processes in turn."""
    import torch

    from llmcompress.compress.methods import rtn
    from llmcompress.compress.scheme import preset
    from llmcompress.compress.stacking import solve_rows
    from llmcompress.distributed import World

    weights = [torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)) for rows in (5, 3, 8)]
    for name in ("W4A16", "NF4-DQ"):
        scheme = preset(name)

        def solve(weight: torch.Tensor, scheme: object = scheme) -> list[object]:
            return [rtn.ENTRY.solve(weight, None, scheme, torch.float32, rtn.ENTRY.settings())]  # type: ignore[arg-type]

        found = solve_rows(torch.cat(weights), [5, 3, 8], solve, World(), scheme.grid.double_quant)  # type: ignore[arg-type]
        for weight, versions in zip(weights, found, strict=True):
            assert versions[0].digest() == solve(weight)[0].digest()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("total", "size"), [(10, 3), (2, 2), (7, 1), (1, 4)])
def test_shares_cover_everything_once(total: int, size: int) -> None:
    from llmcompress.distributed import World

    covered = [i for rank in range(size) for i in range(total)[World(rank, size).share(total)]]
    assert covered == list(range(total))
