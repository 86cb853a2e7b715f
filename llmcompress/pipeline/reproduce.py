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

from llmcompress.config.recipe import HEAD, Recipe, consent_missing
from llmcompress.config.stage import stage
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport


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


def reproduce(
    out: Path, keep: Path | None, progress: Progress, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> Reproduction:
    """Make the checkpoint in `out` again, in `keep` or in a folder that is removed afterwards.

    Consent is the caller's, never the report's, and nothing is written where the report says (a cache of predictions):
    only into the folder of the reproduction.

    Raises: LLMCompressError when `out` has no recipe that makes a checkpoint, what the recipe names is gone, or it was
    made with a consent that is not given here.
    """
    before = RunReport.load(out)
    recorded = before.recipe.get("stages", [])
    stages = [entry for entry in recorded if all(stage(name).kind == "transform" for name in entry)]
    if not stages or before.output is None:
        raise LLMCompressError(f"{out}: its report has no stage that makes a checkpoint")
    given = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    raise_all(consent_missing(before.recipe, given, f"{out}: the recipe in its report"))
    stages = [{name: _without_caches(values) for name, values in entry.items()} for entry in stages]
    with tempfile.TemporaryDirectory(prefix="llmcompress-reproduce-") as scratch:
        target = keep or Path(scratch) / out.resolve().name
        head = {key: value for key, value in before.recipe.items() if key in HEAD} | given | {"output": str(target)}
        made = run(Recipe.of(head | {"stages": stages}), progress)
        folder, after = next(
            (path, report)
            for path, report in made.items()
            if report.output and report.output.format == before.output.format
        )
        files = _compared(out, folder, before, after)
        return Reproduction(files, _reasons(before, after) if not all(files.values()) else [], keep)


def _without_caches(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without the folder that a run would keep its cache in: a speed-up that changes no result."""
    return {key: value for key, value in values.items() if key not in ("cache", "refill_cache")}


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
