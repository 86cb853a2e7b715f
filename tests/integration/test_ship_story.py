"""The whole story, as the README tells it, on the bundled checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT


@pytest.mark.slow
def test_the_story_is_told_to_its_end(tmp_path: Path) -> None:
    environment = os.environ | {
        "LLMCOMPRESS_PYTHON": sys.executable,
        "OUT": str(tmp_path / "story"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [ROOT / "scripts" / "ship_story"], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for said in ("checks   8 of 8 passed", "the same", "chat:", "wrong key:  401 invalid_api_key", "exit code 0"):
        assert said in done.stdout
