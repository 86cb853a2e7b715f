"""`python -m llmcompress.verify.fresh`: the checks of one folder, each printed as soon as it is done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.report import Check, RunReport
from llmcompress.verify import behaviour, files
from llmcompress.verify.stage import ANSWER, names_of, quantized


def checks(folder: Path, settings: dict[str, Any]) -> Iterator[Check]:
    """Every check on one output folder, in the order of stage.py."""
    report = RunReport.load(folder)
    if not quantized(report):
        yield from _plain(folder, report, settings)
        return
    source = original(report)
    known = source if isinstance(source, Checkpoint) else None
    missing = source if isinstance(source, str) else ""
    yield _run("files", lambda: files.digests(folder, report))
    yield _run("tensors", lambda: files.tensors(folder, report, known))
    yield _against("untouched", known, missing, lambda it: files.untouched(folder, report, it))
    yield _run("round trip", lambda: files.round_trip(folder, report))
    yield _against("side files", known, missing, lambda it: files.side_files(folder, it))
    if settings["forward"]:
        trust = bool(report.recipe.get("trust_remote_code"))
        yield from behaviour.checks(folder, known, missing, settings["logits_bound"], report.seed, trust)


def _plain(folder: Path, report: RunReport, settings: dict[str, Any]) -> Iterator[Check]:
    """The checks of an output without codes."""
    yield _run("files", lambda: files.digests(folder, report))
    if "tensors" in names_of(report):
        yield _run("tensors", lambda: files.tensors(folder, report, None))
    if "side files" in names_of(report):
        source = original(report)
        known, missing = (source, "") if isinstance(source, Checkpoint) else (None, source)
        yield _against("side files", known, missing, lambda it: files.side_files(folder, it))
    if "generation" in names_of(report) and settings["forward"]:
        trust = bool(report.recipe.get("trust_remote_code"))
        yield _run("generation", lambda: behaviour.writes(folder, report.seed, trust))


def original(report: RunReport) -> Checkpoint | str:
    """The checkpoint that went in, or why it cannot be held against what came out."""
    if report.source is None:
        return "the report names no source"
    try:
        found = Checkpoint.open(
            report.source.name,
            revision=report.source.revision,
            trust_remote_code=bool(report.recipe.get("trust_remote_code")),
            allow_pickle=bool(report.recipe.get("allow_pickle")),
        )
    except LLMCompressError as error:
        return f"the source is not there ({error.message})"
    same = found.identity() == report.source.identity
    return found if same else f"{report.source.name} is no longer the checkpoint that went in: its sha256 differs"


def _run(name: str, action: Callable[[], Check]) -> Check:
    """The check; what it meets on its way is its failure."""
    try:
        return action()
    except LLMCompressError as error:
        return Check(name=name, passed=False, detail=error.message)


def _against(name: str, source: Checkpoint | None, missing: str, action: Callable[[Checkpoint], Check]) -> Check:
    if source is None:
        return Check(name=name, passed=True, ran=False, detail=f"not run: {missing}")
    return _run(name, lambda: action(source))


def main() -> None:
    """Print an answer line for each check of the folder that the first argument names."""
    asked = json.loads(sys.argv[1])
    for check in checks(Path(asked["folder"]), asked["settings"]):
        sys.stdout.write(f"{ANSWER}{check.model_dump_json()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
