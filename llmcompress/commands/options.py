"""Arguments and options that several verbs share, each spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
