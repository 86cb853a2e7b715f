"""`llmcompress run | recipes ls | recipes show | methods`: whole runs, and what there is to choose from."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmcompress.cli.options import Fresh, Json, Overwrite
from llmcompress.cli.running import guarded, run_stages


@guarded
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that `recipes ls` shows.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Values to replace.")] = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> int:
    """Run a recipe; one that was stopped goes on where it was."""
    from llmcompress.config.recipe import load

    return run_stages(load(recipe, overrides or ()), None, as_json, overwrite=overwrite, fresh=fresh)


@guarded
def recipes_ls(as_json: Json = False) -> int:
    """List the recipes that come with llmcompress."""
    from llmcompress.cli.catalogue import recipe_rows, table

    rows = recipe_rows()
    print(json.dumps(rows, indent=1) if as_json else table(rows))
    return 0


@guarded
def recipes_show(name: Annotated[str, typer.Argument(metavar="RECIPE")], as_json: Json = False) -> int:
    """Print a recipe as it stands in its file (as JSON: with every default filled in)."""
    from llmcompress.config.recipe import load, recipe_file

    print(
        json.dumps(load(name).dump(), indent=1) if as_json else recipe_file(name).read_text(encoding="utf-8").rstrip()
    )
    return 0


@guarded
def methods(as_json: Json = False) -> int:
    """List methods, layouts, and which grid works in which layout and engine."""
    from llmcompress.cli.catalogue import method_catalogue, tables

    found = method_catalogue()
    print(json.dumps(found, indent=1) if as_json else tables(found))
    return 0
