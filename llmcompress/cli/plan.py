"""`llmcompress plan`: sizes, memory and time of a quantization, from config and headers alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from llmcompress.cli.options import GroupSize, Ignore, Json, LayoutOption, Method, Model, Revision, Scheme
from llmcompress.cli.running import given, guarded


@guarded
def plan(
    model: Model,
    scheme: Scheme = None,
    method: Method = None,
    group_size: GroupSize = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point of its own per group.")] = False,
    layout: LayoutOption = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Rows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 2048,
    ignore: Ignore = None,
    revision: Revision = None,
    as_json: Json = False,
) -> int:
    """Say what quantizing would take and give; no weight is read."""
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.cli.planned import matmul_rate, planned
    from llmcompress.compress.planning import plan_quantization
    from llmcompress.compress.settings import QuantizeSettings
    from llmcompress.config.recipe import Recipe

    settings = {"scheme": scheme, "method": method, "group_size": group_size, "format": layout, "ignore": ignore}
    settings["symmetric"] = False if asymmetric else None
    stage = Recipe.of({"model": model, "output": "-", "stages": [{"quantize": given(settings)}]}).stages[0]
    assert isinstance(stage.settings, QuantizeSettings)
    checkpoint = Checkpoint.open(model, revision=revision)
    found = plan_quantization(checkpoint, stage.settings, num_samples * seq_len, seq_len, matmul_rate())
    print(json.dumps(asdict(found), indent=1) if as_json else planned(model, found))
    return 0
