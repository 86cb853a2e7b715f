"""`llmcompress quantize`: from a checkpoint to a smaller one."""

from __future__ import annotations

from typing import Annotated

import typer

from llmcompress.cli.making import Making, making
from llmcompress.cli.options import (
    Calibration,
    GroupSize,
    Ignore,
    LayoutOption,
    Method,
    Model,
    NumSamples,
    Out,
    Scheme,
    SeqLen,
)
from llmcompress.cli.running import given, guarded


@guarded
@making
def quantize(
    model: Model,
    output: Out,
    scheme: Scheme = None,
    method: Method = None,
    group_size: GroupSize = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point of its own per group.")] = False,
    layout: LayoutOption = None,
    calibration: Calibration = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    ignore: Ignore = None,
    effort: Annotated[
        str, typer.Option(help="standard, or max: calibrate asymmetrically, then tune all scales together.")
    ] = "standard",
    asymmetric_calibration: Annotated[
        bool | None, typer.Option(help="Aim at the original's output, where held-out tokens agree.")
    ] = None,
    on_failure: Annotated[str, typer.Option(help="For a linear that cannot be solved: raise or rtn.")] = "raise",
    *,
    common: Making,
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
    return common.run(model, output, [{"quantize": given(settings)}, {"verify": {}}, {"check": {}}, {"card": {}}])
