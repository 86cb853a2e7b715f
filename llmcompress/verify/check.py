"""The check stage: which engines load this checkpoint, by the rules of their own loaders. No weight is read.

    OUT ──> facts (config.json, headers) ──> one table per engine ──> EngineVerdict: loads, or why not, and what to mind
     └────> dry build (transformers) ───────────────────────────────────────^

For transformers the rules are not all: its own quantizer is run on its own model, without weights. It says what an
engine's loader accepts as written; that the numbers are right is what `verify` shows.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.report import EngineVerdict, Finding
from llmcompress.verify.compatibility import NONE, Facts, facts, judge, tables
from llmcompress.verify.settings import CheckSettings


def check(checkpoint: Checkpoint | Path, settings: CheckSettings) -> list[EngineVerdict]:
    """A verdict for each engine asked for, in the order of their names.

    Raises: LLMCompressError for an unknown engine and for a folder that is no checkpoint.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    found = facts(opened)
    names = [settings.engine] if settings.engine else sorted(tables())
    verdicts = [judge(found, name) for name in names]
    for verdict in verdicts:
        if verdict.engine == "transformers" and verdict.loads and found.quant_method != NONE:
            _build(opened, found, verdict)
    return verdicts


def _build(checkpoint: Checkpoint, found: Facts, verdict: EngineVerdict) -> None:
    """Have transformers build the checkpoint without weights, and add what is wrong to its verdict."""
    from llmcompress.models.dry_build import DryBuild, dry_build

    packed = found.values["packed"]
    starts = tuple(f"{stem}." for stem in packed)
    kept = [name for name in checkpoint.stored if not name.startswith(starts) or name.endswith(".bias")]
    try:
        built = dry_build(checkpoint, checkpoint.config["quantization_config"], packed, kept)
    except LLMCompressError as error:
        problem: str | None = error.message
    else:
        problem = built.problem() if isinstance(built, DryBuild) else None
    if problem:
        source = f"transformers {version('transformers')}, its own quantizer on a model without weights"
        verdict.findings.insert(0, Finding(rule="dry-build", level="refuses", detail=problem, source=source))
        verdict.loads = False
