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
Scheme = Annotated[str | None, typer.Option(help="W2A16, W3A16, W4A16 (default), W8A16, NF4 or NF4-DQ.")]
Method = Annotated[str | None, typer.Option(help="How codes are chosen: gptq (default), rtn.")]
GroupSize = Annotated[int | None, typer.Option(help="Inputs that share a scale; -1 = a row.")]
LayoutOption = Annotated[
    str | None, typer.Option("--format", help="gptq, compressed_tensors, bitsandbytes; several with commas.")
]
Calibration = Annotated[str | None, typer.Option(help="Named set, YAML, .txt or .jsonl file.")]
NumSamples = Annotated[int | None, typer.Option(help="Rows of calibration text.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens of a row at most.")]
Ignore = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Linears to leave alone.")]
DataFile = Annotated[str, typer.Option("--data", help="A .jsonl, .json or .parquet file, or a dataset id of the Hub.")]
HeldOut = Annotated[str | None, typer.Option(help="File of held-out rows; default: a tenth of the data.")]
LearningRate = Annotated[float | None, typer.Option(help="Its highest value.")]
Epochs = Annotated[float | None, typer.Option(help="Times through the data.")]
MaxSteps = Annotated[int | None, typer.Option(help="Optimizer steps instead.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per process and batch.")]
Accumulation = Annotated[int | None, typer.Option(help="Batches per optimizer step.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Take evidence again that the report has already.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe.")]
