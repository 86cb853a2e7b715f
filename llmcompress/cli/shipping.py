"""`llmcompress check | push | serve`: what stands between a finished checkpoint and its users."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.options import Folder, Json, Model, Trust
from llmcompress.cli.running import FAILED, given, guarded, head_of, local_folder

if TYPE_CHECKING:
    from llmcompress.publish.push import Plan
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
    from llmcompress.config.recipe import Recipe
    from llmcompress.console import console
    from llmcompress.pipeline.run import run
    from llmcompress.report import is_ours
    from llmcompress.verify.check import CheckSettings
    from llmcompress.verify.check import check as check_engines

    settings = given({"engine": engine})
    checkpoint = Checkpoint.open(folder, trust_remote_code=trust_remote_code)
    if not is_ours(folder):
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


@guarded
def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="Repository on the Hub; made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For everyone to see; default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if there is none.")] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and problems; send nothing.")] = False,
    as_json: Json = False,
) -> int:
    """Put a verified checkpoint with its card on the Hub, in one commit; the token is HF_TOKEN or `hf auth login`'s."""
    from llmcompress.publish import push as pushing

    found = pushing.plan(folder, repo, public=public)
    if dry_run:
        print(json.dumps(_as_data(found), indent=1) if as_json else "\n".join(_as_lines(found)))
        return FAILED if found.findings.refusals else 0
    for warning in found.findings.warnings:
        print(f"note: {warning}", file=sys.stderr)
    done = pushing.push(found, public=public, revision=revision, pull_request=pull_request)
    said = {"commit": done.commit, "pull_request": done.pull_request}
    print(json.dumps(said, indent=1) if as_json else done.pull_request or done.commit)
    return 0


def _as_data(plan: Plan) -> dict[str, object]:
    return {
        "repository": plan.repo_id,
        "files": {file.name: file.num_bytes for file in plan.files},
        "refused": [error.message for error in plan.findings.refusals],
        "warnings": plan.findings.warnings,
    }


def _as_lines(plan: Plan) -> list[str]:
    from llmcompress.console import megabytes

    lines = [f"{megabytes(file.num_bytes):>10}  {file.name}" for file in plan.files]
    lines.append(f"{megabytes(plan.num_bytes):>10}  in {len(plan.files)} files to {plan.repo_id}; nothing was sent")
    lines += [f"note: {warning}" for warning in plan.findings.warnings]
    for error in plan.findings.refusals:
        lines += [f"refused: {error.message}", *([f"hint: {error.hint}"] if error.hint else [])]
    return lines


@guarded
def serve(
    model: Model,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Holds the key that clients send.")] = None,
    make_api_key: Annotated[
        bool, typer.Option("--make-api-key", help="Make a key and say it on stderr, where there is none.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: its folder or Hub id.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> int:
    """Serve a checkpoint with an OpenAI-compatible API, by an engine that can run it here."""
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.publish import serve as serving

    key = serving.api_key(api_key_file, make_api_key)
    serving.require_key(host, key)
    checkpoint = Checkpoint.open(model, trust_remote_code=trust_remote_code)
    choice = serving.choose(checkpoint, engine)
    port = serving.free_port(host, port)
    called = name or checkpoint.hub_id or checkpoint.folder.resolve().name
    print(f"engine {choice.engine}: {choice.why}", file=sys.stderr)
    if make_api_key and key and not (api_key_file and api_key_file.is_file()):
        print(f"API key: {key}", file=sys.stderr)
    said = {"engine": choice.engine, "why": choice.why, "model": called, "address": f"http://{host}:{port}/v1"}
    print(json.dumps(said) if as_json else f"{called} at {said['address']}", flush=True)
    serving.run(checkpoint, choice.engine, called, host=host, port=port, key=key)
    return 0
