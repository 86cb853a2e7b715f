"""`llmcompress finetune | merge`: an adapter trained on a checkpoint, and back into its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.making import Making, making
from llmcompress.cli.options import (
    Accumulation,
    BatchSize,
    Calibration,
    DataFile,
    Epochs,
    GroupSize,
    HeldOut,
    LayoutOption,
    LearningRate,
    MaxSteps,
    Method,
    Model,
    NumSamples,
    Out,
    Scheme,
    SeqLen,
)
from llmcompress.cli.running import given, guarded
from llmcompress.errors import LLMCompressError


@guarded
@making
def finetune(
    model: Model,
    output: Out,
    data: DataFile,
    adapter: Annotated[str, typer.Option(help="qlora, lora or adalora.")] = "qlora",
    base: Annotated[str | None, typer.Option(help="nf4 or full; default: nf4 for qlora, else as stored.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of every linear; for adalora the average.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale times rank; default: twice the rank.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the adapter's input.")] = None,
    target: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Linears to adapt.")] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Learn lengths apart from directions.")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    init: Annotated[str | None, typer.Option(help="default, loftq or residual.")] = None,
    learning_rate: LearningRate = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine or constant.")] = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    seq_len: SeqLen = None,
    packing: Annotated[bool, typer.Option("--packing", help="Several examples in a row.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    heldout: HeldOut = None,
    show_examples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Print N examples as the model will see them, and stop.")
    ] = None,
    *,
    common: Making,
) -> int:
    """Train an adapter on a frozen checkpoint, measure it on held-out rows, verify the files, and draw the card."""
    rows = given({"path": data, "seq_len": seq_len, "packing": packing or None, "heldout": heldout})
    training = given(
        {
            "learning_rate": learning_rate,
            "schedule": schedule,
            "epochs": epochs,
            "max_steps": max_steps,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "gradient_checkpointing": gradient_checkpointing or None,
        }
    )
    settings = {
        "adapter": adapter,
        "base": base,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": target,
        "dora": dora or None,
        "rslora": rslora or None,
        "init": init,
        "data": rows,
        "training": training,
    }
    stages: list[dict[str, Any]] = [{"finetune": given(settings)}, {"verify": {}}, {"card": {}}]
    if show_examples is not None:
        return _show(common.recipe(model, output, stages), common.overrides, show_examples, common.as_json)
    return common.run(model, output, stages)


def _show(recipe: dict[str, Any], overrides: list[str] | None, count: int, as_json: bool) -> int:
    """Print what the first examples become, without training."""
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.checkpoint.source import load_tokenizer
    from llmcompress.config.recipe import Recipe
    from llmcompress.data.examples import load_examples
    from llmcompress.data.preview import as_text, preview

    built = Recipe.of(recipe, overrides or ())
    settings: Any = built.stages[0].settings
    checkpoint = Checkpoint.open(
        built.model,
        revision=built.revision,
        trust_remote_code=built.trust_remote_code,
        allow_pickle=built.allow_pickle,
    )
    tokenizer = load_tokenizer(checkpoint)
    rows = load_examples(settings.data, tokenizer, built.seed)
    shown = preview(rows.train[:count], tokenizer)
    found = {"examples": shown, "data": json.loads(rows.summary.model_dump_json())}
    print(json.dumps(found, indent=1, ensure_ascii=False) if as_json else as_text(shown))
    return 0


@guarded
@making
def merge(
    model: Model,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER[:WEIGHT]…", help="PEFT adapter folders.")],
    output: Out,
    onto: Annotated[
        str | None, typer.Option(help="dequantized or original; default: the weights it was trained on.")
    ] = None,
    then: Annotated[
        str | None,
        typer.Option(metavar="quantize", help="Quantize what was merged, by the options of `quantize`."),
    ] = None,
    scheme: Scheme = None,
    method: Method = None,
    layout: LayoutOption = None,
    calibration: Calibration = None,
    group_size: GroupSize = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    data: Annotated[str | None, typer.Option(help="Rows to measure on; default: those of the training.")] = None,
    *,
    common: Making,
) -> int:
    """Merge adapters into the weights of a checkpoint, check every linear, and draw the card."""
    if then not in (None, "quantize"):
        raise LLMCompressError(f"--then: only quantize can follow, not {then!r}")
    quantize = given(
        {
            "scheme": scheme,
            "method": method,
            "format": layout,
            "calibration": calibration,
            "group_size": group_size,
            "num_samples": num_samples,
            "seq_len": seq_len,
        }
    )
    if quantize and then is None:
        raise LLMCompressError(f"--{next(iter(quantize)).replace('_', '-')}: needs --then quantize")
    settings = {"adapters": [_reference(text) for text in adapters], "onto": onto, "data": data}
    stages: list[dict[str, Any]] = [{"merge": given(settings)}]
    stages += [{"quantize": quantize}] if then else []
    return common.run(model, output, [*stages, {"verify": {}}, {"check": {}}, {"card": {}}])


def _reference(text: str) -> dict[str, Any]:
    """`folder` or `folder:0.5`."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return {"path": text}
    try:
        return {"path": path, "weight": float(weight)}
    except ValueError:
        return {"path": text}
