"""Do it again: the stages that made a checkpoint, from the recipe in its report, and whether the same bytes come out.

    OUT/llmcompress/report.json ── recipe ──> the same stages, in another folder ── digests ──> same, or what differs

Evidence is not taken again: a reproduction answers for the weights, `evaluate` and `verify` for what is said of them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.config.recipe import Recipe
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport

EVIDENCE = ("verify", "check", "evaluate", "measure", "card")
"""Stages that take evidence and change no weight."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of it. files: name -> whether its bytes are the same; reasons: inputs and versions that differ."""

    files: dict[str, bool]
    reasons: list[str]
    folder: Path | None

    @property
    def same(self) -> bool:
        """Whether every file came out byte for byte."""
        return all(self.files.values())


def reproduce(out: Path, keep: Path | None, progress: Progress) -> Reproduction:
    """Make the checkpoint in `out` again, in `keep` or in a folder that is removed afterwards.

    Raises: LLMCompressError when `out` has no recipe that makes a checkpoint, or what the recipe names is gone.
    """
    before = RunReport.load(out)
    stages = [one for one in before.recipe.get("stages", []) if not set(one) & set(EVIDENCE)]
    if not stages or before.output is None:
        raise LLMCompressError(f"{out}: its report has no stage that makes a checkpoint")
    with tempfile.TemporaryDirectory(prefix="llmcompress-reproduce-") as scratch:
        target = keep or Path(scratch) / out.resolve().name
        recipe = Recipe.of(before.recipe | {"output": str(target), "stages": stages})
        made = run(recipe, progress)
        folder, after = next(
            (path, report)
            for path, report in made.items()
            if report.output and report.output.format == before.output.format
        )
        files = _compared(out, folder, before, after)
        return Reproduction(files, _reasons(before, after) if not all(files.values()) else [], keep)


def _compared(out: Path, again: Path, before: RunReport, after: RunReport) -> dict[str, bool]:
    """Weights by the digests of both reports, config.json (which an adapter lacks) by its content."""
    assert before.output is not None and after.output is not None
    names = sorted(before.output.digests.keys() | after.output.digests.keys())
    files = {name: before.output.digests.get(name) == after.output.digests.get(name) for name in names}
    has_config = any((folder / "config.json").is_file() for folder in (out, again))
    return files | ({"config.json": _config(out) == _config(again)} if has_config else {})


def _config(folder: Path) -> Any:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _reasons(before: RunReport, after: RunReport) -> list[str]:
    """What went in that is not what went in before."""
    found = []
    if before.source and after.source and before.source.identity != after.source.identity:
        found.append(f"{before.source.name} is no longer the checkpoint that went in")
    texts = [one.calibration.sha256 if one.calibration else None for one in (before, after)]
    if texts[0] != texts[1]:
        found.append("the calibration text gives other tokens")
    then, now = before.environment, after.environment
    for key in ("llmcompress", "python", "processor", "num_threads", "accelerator"):
        if getattr(then, key) != getattr(now, key):
            found.append(f"{key} was {getattr(then, key)} and is {getattr(now, key)}")
    for name in sorted(then.libraries.keys() | now.libraries.keys()):
        versions = then.libraries.get(name), now.libraries.get(name)
        if versions[0] != versions[1]:
            found.append(f"{name} was {versions[0]} and is {versions[1]}")
    changed = [row.name for row in before.linears if row.digest not in {one.digest for one in after.linears}]
    if changed:
        found.append(f"{len(changed)} of {len(before.linears)} linears have other codes, {changed[0]} first")
    return found or ["nothing that the report knows of differs"]
