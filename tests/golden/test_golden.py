"""The bytes that shipped recipes write do not change by accident; see digests.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden import digests

QUICK = ("w4a16-rtn", "w4-recomputed", "w3-asymmetric-grid", "nf4-dq", "qlora-merge-gptq")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in digests.names()]
)
def test_same_bytes_as_before(name: str, tmp_path: Path) -> None:
    kept = json.loads(digests.FILE.read_text(encoding="utf-8")).get(digests.machine())
    if kept is None:
        pytest.skip(f"no digests were kept on {digests.machine()}")
    assert digests.made(name, tmp_path) == kept[name]


def test_every_shipped_recipe_has_a_case() -> None:
    shipped = {path.stem for path in (digests.ROOT / "llmcompress" / "recipes").glob("*.yaml")}
    assert shipped == set(digests.SHIPPED)
