"""The verbs that are no stages: plan, run, compare, reproduce, push, serve, recipes, methods, guide, completion."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

from llmcompress.api import tools
from llmcompress.api.results import table
from llmcompress.cli.options import Argument, Names, Option, Verb, given, settings_options
from llmcompress.cli.stages import FAILED, MODEL, OUT, as_json, common, show
from llmcompress.config.stage import settings_class
from llmcompress.console import console
from llmcompress.distributed import speaks
from llmcompress.errors import unknown
from llmcompress.publish.limits import ServerLimits

if TYPE_CHECKING:
    from llmcompress.publish.push import Plan

VERBS: dict[str, Callable[[], click.Command]] = {}
"""Name -> how the command is made; `run` is made where it is asked for, as settings take a moment to import."""


def tool(*params: click.Parameter, example: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register the function below as the verb of its name; its docstring is the verb's help."""

    def register(run: Callable[..., int]) -> Callable[..., int]:
        name = run.__name__.rstrip("_")
        VERBS[name] = partial(Verb, name, params=list(params), callback=run, help=run.__doc__, example=example)
        return run

    return register


def path(name: str, metavar: str, text: str, **kwargs: Any) -> Argument:
    """A positional argument that is completed as a path."""
    return Argument([name], metavar=metavar, help=text, type=click.Path(), **kwargs)


def choice(*names: str) -> Names:
    """Text of which these values are known."""
    return Names(lambda: names)


def _plan() -> click.Command:
    own = (
        Option(["num_samples", "--num-samples"], metavar="N", type=click.IntRange(1), default=128, shown=128,
               help="Calibration rows."),
        Option(["seq_len", "--seq-len"], metavar="N", type=click.IntRange(2), default=2048, shown=2048,
               help="Tokens per row."),
    )  # fmt: skip
    quantize = settings_options(settings_class("quantize"), leave_out=("num_samples", "seq_len"))

    def run(model: str, as_json: bool, **options: Any) -> int:
        plan = tools.plan(model, **given(options))
        print(json.dumps(asdict(plan.details), indent=1) if as_json else plan)
        return 0

    return Verb(
        "plan", callback=run, help="Predict sizes, memory, disk and time of a quantization. No weight is read.",
        params=[path("model", "MODEL", MODEL), *own, *quantize, *common("revision", "trust_remote_code")],
        example="llmcompress plan MODEL --scheme W4A16",
    )  # fmt: skip


VERBS["plan"] = _plan


@tool(
    Argument(["recipe"], metavar="RECIPE", help="A YAML file, or a name that `recipes ls` shows."),
    Argument(["overrides"], metavar="[KEY=VALUE]…", nargs=-1, help="Values to replace."),
    *common("trust_remote_code", "allow_pickle", "overwrite", "fresh"),
    example="llmcompress run quickstart output=out/quickstart quantize.scheme=W3A16",
)
def run(recipe: str, overrides: tuple[str, ...], as_json: bool, **how: Any) -> int:
    """Run a recipe. One that was stopped continues where it was."""
    made = tools.run(recipe, *overrides, progress=console(), **given(how))
    return show(made if speaks() else None, as_json)


@tool(
    path("folders", "OUT…", f"{OUT[:-1]}, of one base.", nargs=-1, required=True),
    Option(["html", "--html"], metavar="FILE", help="Page with the table and the figure."),
    Option(["figure", "--figure"], metavar="FILE", help="Pareto figure, as PNG."),
    as_json(),
    example="llmcompress compare out/w4 out/nf4 --html compare.html",
)
def compare(folders: tuple[str, ...], html: str | None, figure: str | None, as_json: bool) -> int:
    """Compare several compressed versions of one base, by their reports."""
    rows = tools.compare(*folders, html=html, figure=figure)
    names = [row["version"] for row in rows]
    turned = [
        {"": key} | {name: row[key] for name, row in zip(names, rows, strict=True)}
        for key in rows[0]
        if key != "version"
    ]
    print(json.dumps(rows.note | {"versions": list(rows)}, indent=1) if as_json else table(turned))
    return 0


@tool(
    path("model", "MODEL", MODEL),
    Option(["output", "-o", "--output"], metavar="FILE", required=True, help="File to write."),
    Option(["format", "--format"], metavar="NAME", type=choice(*tools.EXPORT_FORMATS), default="gguf", shown="gguf",
           help="Format of the file: gguf, what llama.cpp reads."),
    Option(["dense", "--dense"], metavar="TYPE", type=choice("auto", "F32", "F16", "BF16", "Q8_0"), shown="auto",
           help="Type of the matrices that are not quantized; auto: as stored."),
    *common("overwrite"),
    example="llmcompress export out/w4 -o out/w4.gguf",
)  # fmt: skip
def export(model: str, output: str, as_json: bool, **how: Any) -> int:
    """Write a checkpoint as a file of another engine's own. Codes stay as they are."""
    exported = tools.export(model, output, progress=console(), **given(how))
    print(json.dumps(asdict(exported) | {"file": str(exported.file)}, indent=1) if as_json else exported)
    return 0


@tool(
    path("folder", "OUT", OUT),
    Option(["keep", "--keep"], metavar="DIR", help="Folder to keep the result in. [default: removed]"),
    *common("trust_remote_code", "allow_pickle"),
    example="llmcompress reproduce out/w4",
)
def reproduce(folder: str, as_json: bool, **how: Any) -> int:
    """Make a checkpoint again from the recipe in its report, and compare the bytes."""
    rows = tools.reproduce(folder, progress=console(), **given(how))
    same = all(row["same"] for row in rows)
    if as_json:
        files = {row["file"]: row["same"] for row in rows}
        print(json.dumps({"same": same, "files": files, "reasons": rows.failures}, indent=1))
    else:
        print("\n".join(f"{'same     ' if row['same'] else 'DIFFERENT'}  {row['file']}" for row in rows))
        print("\n".join(f"  {reason}" for reason in rows.failures) or "reproduced, byte for byte")
    return 0 if same else FAILED


@tool(
    path("folder", "OUT", OUT),
    Argument(["repo"], metavar="USER/REPO", help="Repository on the Hub; made if there is none."),
    Option(["public", "--public"], is_flag=True, help="Public repository. [default: private]"),
    Option(["revision", "--revision"], metavar="BRANCH", help="Branch to commit to; made if there is none."),
    Option(["pull_request", "--pr"], is_flag=True, help="Pull request instead of a commit."),
    Option(["include", "--include"], metavar="PATTERN", multiple=True, help="Further files to send; repeatable."),
    Option(["dry_run", "--dry-run"], is_flag=True, help="List of files and problems; nothing is sent."),
    as_json(),
    example="llmcompress push out/nf4 USER/REPO --dry-run",
)
def push(
    folder: str, repo: str, public: bool, revision: str | None, pull_request: bool, include: tuple[str, ...],
    dry_run: bool, as_json: bool,
) -> int:  # fmt: skip
    """Put a verified checkpoint with its card on the Hub, in one commit. The token is HF_TOKEN or `hf auth login`'s."""
    plan = tools.push_plan(folder, repo, public=public, include=include)
    if dry_run:
        print(json.dumps(_plan_data(plan), indent=1) if as_json else "\n".join(_plan_lines(plan)))
        return FAILED if plan.findings.refusals else 0
    for warning in plan.findings.warnings:
        print(f"note: {warning}", file=sys.stderr)
    done = tools.push(folder, repo, public=public, revision=revision, pull_request=pull_request, include=include)
    result = {"commit": done.commit, "pull_request": done.pull_request}
    print(json.dumps(result, indent=1) if as_json else done.pull_request or done.commit)
    return 0


def _plan_data(plan: Plan) -> dict[str, object]:
    return {
        "repository": plan.repo_id,
        "files": {file.name: file.num_bytes for file in plan.files},
        "refused": [error.message for error in plan.findings.refusals],
        "warnings": plan.findings.warnings,
    }


def _plan_lines(plan: Plan) -> list[str]:
    from llmcompress.console import megabytes

    lines = [f"{megabytes(file.num_bytes):>10}  {file.name}" for file in plan.files]
    lines.append(f"{megabytes(plan.num_bytes):>10}  in {len(plan.files)} files to {plan.repo_id}; nothing was sent")
    lines += [f"note: {warning}" for warning in plan.findings.warnings]
    for error in plan.findings.refusals:
        lines += [f"refused: {error.message}", *([f"hint: {error.hint}"] if error.hint else [])]
    return lines


@tool(
    path("model", "MODEL", MODEL),
    Option(["engine", "--engine"], metavar="NAME", type=choice("auto", "vllm", "transformers"), shown="auto",
           help="Server."),
    Option(["host", "--host"], metavar="ADDRESS", shown="127.0.0.1",
           help="Address to listen on; any but this machine's own needs a key."),
    Option(["port", "--port"], metavar="N", type=click.IntRange(0, 65535), shown=8000,
           help="Port to listen on; 0: any that is free."),
    Option(["api_key_file", "--api-key-file"], metavar="FILE", help="File with the key that clients send."),
    Option(["make_api_key", "--make-api-key"], is_flag=True, default=None,
           help="A new key, shown on stderr, where there is none."),
    Option(["name", "--name"], metavar="NAME", help="Name of the model for clients. [default: its folder or Hub id]"),
    *settings_options(ServerLimits),
    *common("trust_remote_code"),
    example="llmcompress serve out/nf4 --port 8000",
)  # fmt: skip
def serve(model: str, as_json: bool, **how: Any) -> int:
    """Serve a checkpoint with an OpenAI-compatible API, by an engine that can run it here."""

    def announce(facts: dict[str, str], key: str | None) -> None:
        print(f"engine {facts['engine']}: {facts['why']}", file=sys.stderr)
        if key:
            print(f"API key: {key}", file=sys.stderr)
        print(json.dumps(facts) if as_json else f"{facts['model']} at {facts['address']}", flush=True)

    tools.serve(model, announce=announce, **given(how))
    return 0


@tool(as_json(), example="llmcompress methods")
def methods(as_json: bool) -> int:
    """List methods, layouts, and which grid works in which layout and engine."""
    catalogue = tools.methods()
    print(json.dumps({name: list(rows) for name, rows in catalogue.items()}, indent=1) if as_json else catalogue)
    return 0


def _recipes() -> click.Command:
    def ls(as_json: bool) -> int:
        rows = tools.recipes()
        print(json.dumps(list(rows), indent=1) if as_json else rows)
        return 0

    def show(recipe: str, as_json: bool) -> int:
        from llmcompress.config.recipe import load, recipe_file

        text = recipe_file(recipe).read_text(encoding="utf-8").rstrip()
        print(json.dumps(load(recipe).dump(), indent=1) if as_json else text)
        return 0

    name = Argument(["recipe"], metavar="RECIPE", help="A YAML file, or a name that `recipes ls` shows.")
    commands = [
        Verb("ls", params=[as_json()], callback=ls, help="List the recipes that come with llmcompress."),
        Verb("show", params=[name, as_json()], callback=show, example="llmcompress recipes show quickstart",
             help="Print a recipe as it stands in its file (as JSON: with every default filled in)."),
    ]  # fmt: skip
    settings = {"help_option_names": ["-h", "--help"]}
    return click.Group(
        "recipes", commands=commands, help="List and print the recipes that come with llmcompress.",
        context_settings=settings,
    )  # fmt: skip


VERBS["recipes"] = _recipes


def guides() -> dict[str, Path]:
    """The guides that come with the package, by name."""
    from llmcompress.resources import PACKAGE

    return {file.stem: file for file in sorted((PACKAGE / "guides").glob("*.md")) if file.stem != "README"}


@tool(
    Argument(["name"], metavar="[NAME]", required=False, type=Names(guides), help="A guide, such as quantize."),
    as_json(),
    example="llmcompress guide quantize",
)
def guide(name: str | None, as_json: bool) -> int:
    """Print a guide; without a name, list them."""
    known = guides()
    if name is not None and name not in known:
        raise unknown("guide", name, known)
    if name is not None:
        text = known[name].read_text(encoding="utf-8").rstrip()
        print(json.dumps({"guide": name, "text": text}) if as_json else text)
        return 0
    rows = [
        {"guide": guide, "what it is": file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")}
        for guide, file in known.items()
    ]
    print(json.dumps(rows, indent=1) if as_json else table(rows) if rows else "no guides in this installation")
    return 0


@tool(
    Argument(["shell"], metavar="SHELL", type=choice("bash", "zsh", "fish"), help="bash, zsh or fish."),
    example='eval "$(llmcompress completion bash)"    # in ~/.bashrc',
)
def completion(shell: str) -> int:
    """Print the script that lets a shell complete commands, options and their values."""
    from llmcompress.cli.main import COMPLETE, app

    kind = get_completion_class(shell)
    if kind is None:
        raise unknown("shell", shell, ["bash", "zsh", "fish"])
    print(kind(app(), {}, "llmcompress", COMPLETE).source())
    return 0
