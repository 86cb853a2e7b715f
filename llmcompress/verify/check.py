"""The check stage: which engines load this checkpoint, by the rules of their own loaders. Nothing is loaded.

    OUT ──> facts (config.json, headers) ──> one table per engine ──> EngineVerdict: loads, or why not, and what to mind

It says what an engine's loader accepts as written; that the numbers are right is what `verify` shows.
"""

from __future__ import annotations

from pathlib import Path

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.report import EngineVerdict
from llmcompress.verify.compatibility import facts, judge, tables
from llmcompress.verify.settings import CheckSettings


def check(checkpoint: Checkpoint | Path, settings: CheckSettings) -> list[EngineVerdict]:
    """A verdict for each engine asked for, in the order of their names.

    Raises: LLMCompressError for an unknown engine and for a folder that is no checkpoint.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    found = facts(opened)
    names = [settings.engine] if settings.engine else sorted(tables())
    return [judge(found, name) for name in names]
