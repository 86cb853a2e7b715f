"""The command `llmcompress`. Every verb builds a recipe and runs it, so there is one way to run anything.

    quantize MODEL -o OUT   [quantize, verify, check, card]      evaluate MODEL       [evaluate, card]
    finetune MODEL -o OUT   [finetune, card]                     merge MODEL ADAPTER  [merge, verify, card]
    distill --teacher T …   [distill, verify, card]
    verify OUT              [verify, card]                       measure OUT          [measure, card]
    check MODEL             [check, card]                        card OUT             [card]
    run RECIPE key=value …  what the file says                   recipes, methods     what there is

    reproduce OUT, compare OUT…, push OUT USER/REPO and serve MODEL work on what is there.

Engines are imported when a stage runs, so that `--help` is there at once.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llmcompress import __version__
from llmcompress.cli import compress, distill, evidence, plan, recipe, shipping, train
from llmcompress.memory import large_blocks_mapped

app = typer.Typer(
    name="llmcompress",
    help="Make a language-model checkpoint small, measure what that cost, and ship it with the evidence.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    compress.quantize,
    plan.plan,
    train.finetune,
    train.merge,
    distill.distill,
    evidence.evaluate,
    evidence.measure,
    evidence.verify,
    evidence.reproduce,
    evidence.compare,
    evidence.card,
    shipping.check,
    shipping.push,
    shipping.serve,
    recipe.run,
    recipe.methods,
):
    app.command()(verb)
recipes = typer.Typer(help="Recipes that come with llmcompress.", no_args_is_help=True, rich_markup_mode=None)
recipes.command("ls")(recipe.recipes_ls)
recipes.command("show")(recipe.recipes_show)
app.add_typer(recipes, name="recipes")


def _version(shown: bool) -> None:
    if shown:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point. OpenMP's idle threads sleep instead of spinning, which on a busy machine costs whole cores."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with large_blocks_mapped():
        app(prog_name="llmcompress")
