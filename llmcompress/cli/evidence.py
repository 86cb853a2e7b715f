"""`llmcompress evaluate | measure | verify | reproduce | compare | card`: what is known of a checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.options import Folder, Fresh, Json, Model, Seed, Trust
from llmcompress.cli.running import FAILED, given, guarded, head_of, local_folder, run_stages
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
    from llmcompress.report import is_ours

    folder = local_folder(model, trust_remote_code)
    settings = {"suite": suite, "baseline": baseline, "engine": engine, "limit": limit, "batch_size": batch_size}
    settings["allow_overlap"] = allow_overlap or None
    stages: list[dict[str, Any]] = [{"evaluate": given(settings)}]
    if is_ours(folder):
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
def reproduce(
    folder: Folder,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep what comes out; default: removed.")] = None,
    as_json: Json = False,
) -> int:
    """Make a checkpoint again from the recipe in its report, and compare the bytes."""
    from llmcompress.console import console
    from llmcompress.pipeline.reproduce import reproduce as again

    found = again(folder, keep, console())
    if as_json:
        print(json.dumps({"same": found.same, "files": found.files, "reasons": found.reasons}, indent=1))
    else:
        print("\n".join(f"{'same     ' if same else 'DIFFERENT'}  {name}" for name, same in found.files.items()))
        print("\n".join(f"  {reason}" for reason in found.reasons) or "reproduced, byte for byte")
    return 0 if found.same else FAILED


@guarded
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="OUT…", help="Folders that llmcompress wrote, of one base.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page with the figure in it.")] = None,
    figure: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the figure, as PNG.")] = None,
    as_json: Json = False,
) -> int:
    """Set several compressed versions of one base side by side, out of their reports."""
    from llmcompress.card.compare import compare as compared
    from llmcompress.card.compare import page, plots, rows
    from llmcompress.cli.catalogue import table

    found = compared(folders)
    if html or figure:
        from llmcompress.card.figures import draw_pareto

        with tempfile.TemporaryDirectory() as scratch:
            drawn = draw_pareto(plots(found), found.base_bytes / 1e6, figure or Path(scratch) / "pareto.png")
            if html:
                html.parent.mkdir(parents=True, exist_ok=True)
                html.write_text(page(found, drawn), encoding="utf-8")
    said = {"base": found.base, "base_bytes": found.base_bytes, "versions": rows(found)}
    print(json.dumps(said, indent=1) if as_json else _side_by_side(rows(found), table))
    return 0


def _side_by_side(found: list[dict[str, str]], table: Callable[[list[dict[str, Any]]], str]) -> str:
    """The table turned over: a line for each thing that was measured, a column for each version."""
    names = [row["version"] for row in found]
    keys = [key for key in found[0] if key != "version"]
    return table([{"": key} | {name: row[key] for name, row in zip(names, found, strict=True)} for key in keys])


@guarded
def card(folder: Folder, as_json: Json = False) -> int:
    """Draw the model card from the report."""
    return run_stages(head_of(folder) | {"stages": [{"card": {}}]}, None, as_json, judge=False)
