"""The guides run from top to bottom: every shell and Python block, in order, in one empty folder per guide.

A ```bash block is run by bash with `-e`, a ```python block by Python; neighbors of one language share a process, as the
cells of a notebook do. A ```console block shows what needs the Hub, a GPU or a daemon: it is not run, but its commands
are held against `--help` in tests/architecture/test_command_line.py.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmcompress
from tests.architecture.sources import ROOT

GUIDES = sorted((ROOT / "llmcompress" / "guides").glob("*.md"))
QUICK = {"python"}
"""Guides that the default run executes; the others take half a minute to two minutes each."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and source of every block that is to be run.

    >>> blocks("# A\\n```bash\\ntrue\\n```\\n```console\\n$ no\\n```\\n")
    [('bash', 'true\\n')]
    """
    return re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.M | re.S)


def program(folder: Path) -> Path:
    """A folder for PATH with `llmcompress` and `python`, so that a block runs as it stands."""
    folder.mkdir()
    for name, arguments in (("llmcompress", "-m llmcompress"), ("python", "")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "guide",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow]) for path in GUIDES],
)
def test_guide_runs(guide: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {
        "PATH": f"{program(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(llmcompress.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }
    for language, group in itertools.groupby(blocks(guide.read_text(encoding="utf-8")), key=lambda block: block[0]):
        source = "\n".join(text for _, text in group)
        command = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, source], cwd=work, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, f"{source}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
