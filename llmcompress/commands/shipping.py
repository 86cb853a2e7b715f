"""`llmcompress check`: what stands between a finished checkpoint and its users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.commands.options import Json, Model, Trust
from llmcompress.commands.running import FAILED, given, guarded, head_of, local_folder

if TYPE_CHECKING:
    from llmcompress.report import EngineVerdict


@guarded
def check(
    model: Model,
    engine: Annotated[
        str | None, typer.Option(help="One engine: vllm, sglang, transformers, gptqmodel, tgi; default: all.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> int:
    """Say which engines load a checkpoint, by the rules of their own loaders; loads nothing."""
    folder = local_folder(model, trust_remote_code)
    verdicts = _verdicts(folder, engine, trust_remote_code)
    if as_json:
        print(json.dumps([one.model_dump() for one in verdicts], indent=1))
    else:
        print("\n".join(line for one in verdicts for line in verdict_lines(one)))
    return 0 if any(one.loads for one in verdicts) else FAILED


def _verdicts(folder: Path, engine: str | None, trust_remote_code: bool) -> list[EngineVerdict]:
    """The verdicts asked for; those on a folder of ours go into its report and its card."""
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.console import console
    from llmcompress.output import ours
    from llmcompress.recipe import Recipe
    from llmcompress.run import run
    from llmcompress.verify.check import CheckSettings
    from llmcompress.verify.check import check as check_engines

    settings = given({"engine": engine})
    if not ours(folder):
        checkpoint = Checkpoint.open(folder, trust_remote_code=trust_remote_code)
        return check_engines(checkpoint, CheckSettings(**settings))
    recipe = Recipe.of(head_of(folder) | {"stages": [{"check": settings}, {"card": {}}]})
    found = next(iter(run(recipe, console(), fresh=True).values())).engines
    return [one for one in found if engine in (None, one.engine)]


def verdict_lines(verdict: EngineVerdict) -> list[str]:
    """An engine's verdict and, below it, what speaks against it."""
    said = {True: "loads it", False: "does not load it", None: "not judged"}[verdict.loads]
    needs = f", with {' and '.join(verdict.needs)}" if verdict.needs and verdict.loads else ""
    lines = [f"{verdict.engine} {verdict.version}: {said}{needs}"]
    return lines + [f"  {one.level:<8}{one.rule}: {one.detail}  [{one.source}]" for one in verdict.findings]
