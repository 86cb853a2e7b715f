"""`llmcompress distill`: from teachers to a student."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmcompress.cli.making import Making, making
from llmcompress.cli.options import (
    Accumulation,
    BatchSize,
    DataFile,
    Epochs,
    HeldOut,
    LearningRate,
    MaxSteps,
    Out,
    SeqLen,
)
from llmcompress.cli.running import given, guarded
from llmcompress.errors import LLMCompressError


@guarded
@making
def distill(
    output: Out,
    data: DataFile,
    teacher: Annotated[
        list[str], typer.Option(metavar="MODEL", help="Folder, Hub id or bundled/NAME; several are averaged.")
    ],
    teacher_weight: Annotated[
        list[float] | None, typer.Option(metavar="W", help="One per teacher, in their order; default: all alike.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="A checkpoint or a config.json; default: cut it.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the teacher's layers, evenly spaced.")] = None,
    student_layers: Annotated[str | None, typer.Option(help="Which of the teacher's layers, e.g. 0,2,4.")] = None,
    keep_units: Annotated[float | None, typer.Option(help="Share of the feed-forward units.")] = None,
    keep_heads: Annotated[float | None, typer.Option(help="Share of the heads.")] = None,
    loss: Annotated[
        list[str] | None, typer.Option(metavar="NAME=W", help="forward_kl, reverse_kl, js, ce, hidden_mse, …; repeat.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both distributions.")] = None,
    layer_map: Annotated[str | None, typer.Option(help="uniform, last, final, or pairs such as 0:1,1:3.")] = None,
    combine: Annotated[str | None, typer.Option(help="Average probabilities or logits.")] = None,
    cache: Annotated[str | None, typer.Option(help="Folder of cached predictions of the teachers.")] = None,
    refill_cache: Annotated[
        bool, typer.Option("--refill-cache", help="Fill it again where another teacher or other data filled it.")
    ] = False,
    one_at_a_time: Annotated[bool, typer.Option("--one-at-a-time", help="Never two teachers in memory.")] = False,
    lmbda: Annotated[
        float | None, typer.Option(help="Share of the batches that the student writes itself (on-policy, GKD).")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="That it writes at most.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapters on a quantized student.")] = None,
    max_steps: MaxSteps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    learning_rate: LearningRate = None,
    seq_len: SeqLen = None,
    heldout: HeldOut = None,
    *,
    common: Making,
) -> int:
    """Train a student to do what its teachers do, verify the files, and draw its card."""
    training = {
        "max_steps": max_steps, "epochs": epochs, "batch_size": batch_size, "accumulation": accumulation,
        "learning_rate": learning_rate,
    }  # fmt: skip
    weights = _weights(teacher, teacher_weight)
    settings: dict[str, Any] = {
        "data": given({"path": data, "seq_len": seq_len, "heldout": heldout}),
        "training": given(training),
        "student": student,
        "keep": keep,
        "layers": student_layers,
        "keep_units": keep_units,
        "keep_heads": keep_heads,
        "adapter": given({"rank": rank}) or None,
        "weight": weights[0],
        "teachers": [{"model": name, "weight": weight} for name, weight in zip(teacher[1:], weights[1:], strict=True)],
        "combine": combine,
        "losses": loss,
        "temperature": temperature,
        "layer_map": layer_map,
        "on_policy": given({"lmbda": lmbda, "max_new_tokens": max_new_tokens}) or None,
        "cache": cache,
        "refill_cache": refill_cache or None,
        "one_at_a_time": one_at_a_time or None,
    }
    stages: list[dict[str, Any]] = [{"distill": given(settings)}, {"verify": {}}, {"check": {}}, {"card": {}}]
    return common.run(teacher[0], output, stages)


def _weights(teachers: list[str], weights: list[float] | None) -> list[float]:
    found = list(weights or [1.0] * len(teachers))
    if len(found) != len(teachers):
        raise LLMCompressError(
            f"--teacher-weight: {len(found)} weights for {len(teachers)} teachers", "give one per --teacher, in order"
        )
    return found
