"""The command `llmcompress`. Every verb builds a recipe and runs it, so there is one way to run anything.

    quantize MODEL -o OUT     [quantize, verify, card]        evaluate MODEL     [evaluate, card]
    verify OUT                [verify, card]                  card OUT           [card]
    run RECIPE key=value …    what the file says              recipes, methods   what there is

Data goes to stdout, everything else to stderr. Exit codes: 0 fine, 1 a check or a budget failed, 2 bad input,
130 interrupted. Engines are imported when a stage runs, so that `--help` is there at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress import __version__
from llmcompress.errors import LLMCompressError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="llmcompress",
    help="Make a language-model checkpoint small, measure what that cost, and ship it with the evidence.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="Recipes that come with llmcompress.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes, name="recipes")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, Hub id or bundled/NAME.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that llmcompress wrote.")]
Out = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder of the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that draws lots.")]
Revision = Annotated[str | None, typer.Option(help="Of a Hub id: commit, tag or branch.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read weights that can run code when they are read.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what another recipe wrote there.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Take evidence again that the report has already.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe.")]


def guarded(verb: Callable[..., int]) -> Callable[..., None]:
    """The verb, leaving with its exit code; a user's mistake is said on stderr, without a traceback."""

    @functools.wraps(verb)
    def run_verb(*args: Any, **kwargs: Any) -> None:
        try:
            code = verb(*args, **kwargs)
        except LLMCompressError as error:
            for line in error.lines():
                print(line if line.startswith("hint: ") else f"error: {line}", file=sys.stderr)
            code = BAD_INPUT
        except KeyboardInterrupt:
            print(
                "interrupted; the same command goes on from the last layer or stage that was finished", file=sys.stderr
            )
            code = INTERRUPTED
        raise typer.Exit(code)

    return run_verb


@app.command()
@guarded
def quantize(
    model: Model,
    output: Out,
    scheme: Annotated[str, typer.Option(help="W2A16, W3A16, W4A16, W8A16, NF4 or NF4-DQ.")] = "W4A16",
    method: Annotated[str, typer.Option(help="How codes are chosen: gptq, rtn.")] = "gptq",
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale; -1 = a row.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point of its own per group.")] = False,
    layout: Annotated[
        str | None, typer.Option("--format", help="gptq, compressed_tensors, bitsandbytes; several with commas.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Named set, YAML, .txt or .jsonl file.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Rows of calibration text.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Linears to leave alone.")] = None,
    on_failure: Annotated[str, typer.Option(help="For a linear that cannot be solved: raise or rtn.")] = "raise",
    seed: Seed = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> int:
    """Quantize a checkpoint, verify the files, and draw the card."""
    settings = {
        "scheme": scheme,
        "method": method,
        "group_size": group_size,
        "symmetric": False if asymmetric else None,
        "format": layout,
        "calibration": calibration,
        "num_samples": num_samples,
        "seq_len": seq_len,
        "ignore": ignore,
        "on_failure": on_failure,
    }
    head = {"model": model, "output": str(output), "seed": seed, "revision": revision}
    head |= {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    stages = [{"quantize": _given(settings)}, {"verify": {}}, {"card": {}}]
    return _run(head | {"stages": stages}, overrides, as_json, overwrite=overwrite)


@app.command()
@guarded
def evaluate(
    model: Model,
    suite: Annotated[str, typer.Option(help="A bundled suite, or a YAML of one.")],
    baseline: Annotated[
        str | None, typer.Option(help="What it is compared with; default: what it was made from.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, native (the format's own kernels) or dequantized.")] = "auto",
    limit: Annotated[int | None, typer.Option(help="Items per task at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that are computed together.")] = 8,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> int:
    """Compare a checkpoint with its baseline on the same items, and redraw its card."""
    from llmcompress.output import ours

    folder = _local(model, trust_remote_code)
    settings = {"suite": suite, "baseline": baseline, "engine": engine, "limit": limit, "batch_size": batch_size}
    stages: list[dict[str, Any]] = [{"evaluate": _given(settings)}]
    if ours(folder):
        source = _head(folder) | {"seed": seed}
        return _run(source | {"stages": [*stages, {"card": {}}]}, None, as_json, fresh=fresh)
    if baseline is None:
        raise LLMCompressError(f"{model}: was not made by llmcompress, so its source is not known", "pass --baseline")
    head = {"model": baseline, "output": str(folder), "seed": seed, "trust_remote_code": trust_remote_code}
    return _run(head | {"stages": stages}, None, as_json, record=False)


@app.command()
@guarded
def verify(
    folder: Folder,
    forward: Annotated[bool, typer.Option(help="Also run some tokens through the model.")] = True,
    as_json: Json = False,
) -> int:
    """Hold the files of a checkpoint against its report: digests, tensors, codes and a forward pass."""
    stages = [{"verify": {"forward": forward}}, {"card": {}}]
    return _run(_head(folder) | {"stages": stages}, None, as_json, fresh=True)


@app.command()
@guarded
def card(folder: Folder, as_json: Json = False) -> int:
    """Draw the model card from the report."""
    return _run(_head(folder) | {"stages": [{"card": {}}]}, None, as_json, judge=False)


@app.command()
@guarded
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that `recipes ls` shows.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Values to replace.")] = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> int:
    """Run a recipe; one that was stopped goes on where it was."""
    from llmcompress.recipe import load

    return _run(load(recipe, overrides or ()), None, as_json, overwrite=overwrite, fresh=fresh)


@recipes.command("ls")
@guarded
def recipes_ls(as_json: Json = False) -> int:
    """List the recipes that come with llmcompress."""
    from llmcompress.catalogue import recipe_rows, table

    rows = recipe_rows()
    print(json.dumps(rows, indent=1) if as_json else table(rows))
    return 0


@recipes.command("show")
@guarded
def recipes_show(name: Annotated[str, typer.Argument(metavar="RECIPE")], as_json: Json = False) -> int:
    """Print a recipe as it stands in its file (as JSON: with every default filled in)."""
    from llmcompress.recipe import load, recipe_file

    print(
        json.dumps(load(name).dump(), indent=1) if as_json else recipe_file(name).read_text(encoding="utf-8").rstrip()
    )
    return 0


@app.command()
@guarded
def methods(as_json: Json = False) -> int:
    """List methods, layouts, and which grid works in which layout and engine."""
    from llmcompress.catalogue import method_catalogue, tables

    found = method_catalogue()
    print(json.dumps(found, indent=1) if as_json else tables(found))
    return 0


def _version(shown: bool) -> None:
    if shown:
        print(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what was not said, so that defaults have one place: the settings' own."""
    return {key: value for key, value in settings.items() if value is not None and value != []}


def _local(model: str, trust_remote_code: bool) -> Path:
    """The folder of a checkpoint, fetched from the Hub where it is one of the Hub."""
    from llmcompress.checkpoint.reader import Checkpoint

    return Path(model) if Path(model).is_dir() else Checkpoint.open(model, trust_remote_code=trust_remote_code).folder


def _head(folder: Path) -> dict[str, Any]:
    """What a recipe that goes on with a finished folder says beside its stages."""
    from llmcompress.recipe import HEAD
    from llmcompress.report import RunReport

    made_by = RunReport.load(folder).recipe
    return {key: value for key, value in made_by.items() if key in HEAD} | {"output": str(folder)}


def _run(recipe: Any, overrides: list[str] | None, as_json: bool, *, judge: bool = True, **how: bool) -> int:
    """Run a recipe (or what one is built from), print what came of it, and give the exit code."""
    from llmcompress.console import console
    from llmcompress.recipe import Recipe
    from llmcompress.run import run as run_recipe
    from llmcompress.summary import failures, summary

    built = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe, overrides or ())
    reports = run_recipe(built, console(), **how)
    if as_json:
        found = [json.loads(report.model_dump_json()) | {"folder": str(folder)} for folder, report in reports.items()]
        print(json.dumps(found if len(found) > 1 else found[0], indent=1))
    else:
        print("\n\n".join(summary(folder, report) for folder, report in reports.items()))
    return FAILED if judge and any(failures(report) for report in reports.values()) else 0


def main() -> None:
    """The entry point. OpenMP's idle threads sleep instead of spinning, which on a busy machine costs whole cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="llmcompress")
