"""`llmcompress quantize`: from a checkpoint to a smaller one."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcompress.commands.options import Json, Model, Out, Overrides, Overwrite, Pickle, Revision, Seed, Trust
from llmcompress.commands.running import given, guarded, run_stages


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
    effort: Annotated[
        str, typer.Option(help="standard, or max: calibrate asymmetrically, then tune all scales together.")
    ] = "standard",
    asymmetric_calibration: Annotated[
        bool | None, typer.Option(help="Aim at the original's output, where held-out tokens agree.")
    ] = None,
    on_failure: Annotated[str, typer.Option(help="For a linear that cannot be solved: raise or rtn.")] = "raise",
    seed: Seed = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    overwrite: Overwrite = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> int:
    """Quantize a checkpoint, verify the files, say which engines load them, and draw the card."""
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
        "effort": effort,
        "asymmetric_calibration": asymmetric_calibration,
        "on_failure": on_failure,
    }
    head = {"model": model, "output": str(output), "seed": seed, "revision": revision}
    head |= {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    stages = [{"quantize": given(settings)}, {"verify": {}}, {"check": {}}, {"card": {}}]
    return run_stages(head | {"stages": stages}, overrides, as_json, overwrite=overwrite)
