"""`llmcompress evaluate | verify | card`: what is known of a checkpoint, taken and shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmcompress.commands.options import Folder, Fresh, Json, Model, Seed, Trust
from llmcompress.commands.running import given, guarded, head_of, local_folder, run_stages
from llmcompress.errors import LLMCompressError


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
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Evaluate on items that its own text holds; the card shows it.")
    ] = False,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> int:
    """Compare a checkpoint with its baseline on the same items, and redraw its card."""
    from llmcompress.output import ours

    folder = local_folder(model, trust_remote_code)
    settings = {"suite": suite, "baseline": baseline, "engine": engine, "limit": limit, "batch_size": batch_size}
    settings["allow_overlap"] = allow_overlap or None
    stages: list[dict[str, Any]] = [{"evaluate": given(settings)}]
    if ours(folder):
        source = head_of(folder) | {"seed": seed}
        return run_stages(source | {"stages": [*stages, {"card": {}}]}, None, as_json, fresh=fresh)
    if baseline is None:
        raise LLMCompressError(f"{model}: was not made by llmcompress, so its source is not known", "pass --baseline")
    head = {"model": baseline, "output": str(folder), "seed": seed, "trust_remote_code": trust_remote_code}
    return run_stages(head | {"stages": stages}, None, as_json, record=False)


@guarded
def measure(
    folder: Folder,
    baseline: Annotated[
        str | None, typer.Option(help="What it is compared with; default: what it was made from.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, native (the format's own kernels) or dequantized.")] = "auto",
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens that are written.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How often each model is timed, in turn.")] = None,
    as_json: Json = False,
) -> int:
    """Time a checkpoint and its baseline in turn (prefill, decode, loading, memory), and redraw its card."""
    settings = {"baseline": baseline, "engine": engine, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    stages = [{"measure": given(settings | {"rounds": rounds})}, {"card": {}}]
    return run_stages(head_of(folder) | {"stages": stages}, None, as_json, judge=False, fresh=True)


@guarded
def verify(
    folder: Folder,
    forward: Annotated[bool, typer.Option(help="Also run some tokens through the model.")] = True,
    as_json: Json = False,
) -> int:
    """Hold the files of a checkpoint against its report: digests, tensors, codes and a forward pass."""
    stages = [{"verify": {"forward": forward}}, {"card": {}}]
    return run_stages(head_of(folder) | {"stages": stages}, None, as_json, fresh=True)


@guarded
def card(folder: Folder, as_json: Json = False) -> int:
    """Draw the model card from the report."""
    return run_stages(head_of(folder) | {"stages": [{"card": {}}]}, None, as_json, judge=False)
