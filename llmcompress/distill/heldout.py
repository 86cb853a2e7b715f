"""What a student and its teacher do on rows that were held out: the figures that stand side by side on the card.

    causal, masked    nll of the labels (perplexity is exp of it), KL(teacher || student), same likeliest token
    classification    accuracy, KL(teacher || student), same likeliest class
    embedding         cosine of the student's vector and the teacher's

Every figure is a mean over the predictions that count, at temperature 1. With a cache the KL is that of the folded
distributions (topk.py), which is never more than the whole. Speed is the median over the batches of the
same rows, forward passes only, on this machine.

Shapes: B rows of a batch, S tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompress.distill import losses, topk
from llmcompress.distill.kinds import Kind
from llmcompress.distill.objective import NOT_INPUTS, labels_in_step
from llmcompress.distill.teachers import Source, pooled, predictions, run


@dataclass(frozen=True)
class Figures:
    """Means over held-out predictions; None for what does not apply. num_items: predictions, or texts."""

    nll: float | None = None
    accuracy: float | None = None
    kl: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    num_items: int = 0
    rows_per_s: float = 0.0
    beside_rows_per_s: float | None = None


def measure(
    student: nn.Module, source: Source | None, batches: Iterable[Mapping[str, torch.Tensor]], kind: Kind,
    vocabulary: int, pooling: str, beside: nn.Module | None = None,
) -> Figures:  # fmt: skip
    """A model's figures on some batches, against the teacher's answers where there is a `source` (at temperature 1).

    beside: a model that is timed on the same batches.
    """
    sums: dict[str, list[float]] = {name: [0.0, 0] for name in ("nll", "accuracy", "kl", "agreement", "cosine")}
    speeds: list[float] = []
    others: list[float] = []

    def add(name: str, values: torch.Tensor) -> None:
        sums[name][0] += float(values.double().sum())
        sums[name][1] += values.numel()

    was_training = student.training
    student.eval()
    with torch.inference_mode():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
            output, speed = _timed(student, inputs, kind, batch["row"].numel())
            speeds.append(speed)
            others += [_timed(beside, inputs, kind, batch["row"].numel())[1]] if beside is not None else []
            answer = source.answer(inputs, batch["row"]) if source is not None else None
            if kind == "embedding":
                mine = pooled(output.hidden_states[-1], batch["attention_mask"], pooling)
                for inside in answer.insides[:1] if answer else ():
                    theirs = pooled(inside.hidden[-1], batch["attention_mask"], pooling)
                    if mine.shape == theirs.shape:
                        add("cosine", 1 - losses.hidden_cosine(mine, theirs))
                continue
            _predictions(output, answer, batch, kind, vocabulary, add)
    student.train(was_training)
    means = {name: total / count if count else None for name, (total, count) in sums.items()}
    count = int(max(entry[1] for entry in sums.values()))
    speed = statistics.median(speeds) if speeds else 0.0
    return Figures(
        **means, num_items=count, rows_per_s=speed, beside_rows_per_s=statistics.median(others) if others else None
    )


def _timed(model: nn.Module, inputs: Mapping[str, torch.Tensor], kind: Kind, rows: int) -> tuple[Any, float]:
    """A model's output on a batch, and its rows per second."""
    began = time.perf_counter()
    output = run(model, inputs, kind, hidden=False, attentions=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return output, rows / (time.perf_counter() - began)


def _predictions(
    output: Any, answer: Any, batch: Mapping[str, torch.Tensor], kind: Kind, vocabulary: int, add: Any
) -> None:
    counts_BS, labels_BS = labels_in_step(kind, batch)
    student_BSV = losses.log_probs(predictions(output, kind)[..., :vocabulary])
    if answer is not None and answer.target is not None:
        student, teacher = student_BSV[counts_BS], answer.target[:, : counts_BS.shape[1]][counts_BS]
        first = teacher.argmax(-1)
        likeliest = student.argmax(-1)
        if answer.ids_BSK is not None:
            ids_TK = answer.ids_BSK[:, : counts_BS.shape[1]][counts_BS]
            student, first = topk.folded(student, ids_TK), ids_TK[:, 0]
        add("kl", losses.forward_kl(student, teacher))
        add("agreement", (likeliest == first).float())
    labelled_BS = labels_BS != -100
    if bool(labelled_BS.any()):
        student, labels = student_BSV[labelled_BS], labels_BS[labelled_BS]
        add("nll", -student.gather(-1, labels[:, None])[:, 0])
        if kind == "classification":
            add("accuracy", (student.argmax(-1) == labels).float())
