"""From two runs over the same items, or two models' figures on the same rows, to a row of the report.

A verdict needs pairs, so the first thing here is the proof that there are any: item by item, both runs must carry the
same document number and the same digest over document and prompts.

Shapes: N items or rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.harness import Item, ReadyTask, TaskRun
from llmcompress.evaluate.statistics import (
    MEAN_METHOD,
    SCORE_METHOD,
    Floats,
    flips,
    items_needed,
    loss_interval,
    mcnemar_p,
    mean_interval,
    overall,
    paired_interval,
    score,
    verdict,
)
from llmcompress.evaluate.suite import TaskEntry, TextEntry
from llmcompress.evaluate.text import RowFigures, TextFigures
from llmcompress.evaluate.text_metrics import TEXT_METRICS, TextMetric
from llmcompress.files import write_atomic
from llmcompress.report import MIN_ITEMS, MIN_ROWS, TaskResult, TextFigure, TextResult


def mismatch(before: TaskRun, after: TaskRun) -> str | None:
    """What differs between the items of two runs, or None when they are the same items in the same order."""
    if len(before.items) != len(after.items):
        return f"the baseline has {len(before.items)} items, the compressed model {len(after.items)}"
    for left, right in zip(before.items, after.items, strict=True):
        if (left.doc_id, left.digest) != (right.doc_id, right.digest):
            return f"item {right.doc_id} of the compressed model is not the baseline's item {left.doc_id}"
    return None


def task_result(entry: TaskEntry, task: ReadyTask, before: TaskRun, after: TaskRun, seed: int) -> TaskResult:
    """One metric of a task, baseline `before` and compressed `after`, with its verdict.

    Raises: LLMCompressError when the items differ, or one has no finite score.
    """
    differs = mismatch(before, after)
    if differs is not None:
        raise LLMCompressError(f"task {task.name}: {differs}", "both models must be given the same items")
    key = task.score_key(entry.metric)
    before_N, after_N = (_scores(task.name, key, run.items) for run in (before, after))
    flipped = flips(before_N, after_N)
    interval = task_interval(before_N, after_N, seed)
    enough = len(after_N) >= MIN_ITEMS
    higher_is_better = task.higher_is_better.get(entry.metric.partition(",")[0], True)
    return TaskResult(
        task=entry.task,
        metric=entry.metric,
        num_fewshot=entry.num_fewshot,
        num_items=len(after_N),
        items_sha256=hashlib.sha256("".join(item.digest for item in after.items).encode()).hexdigest(),
        baseline=score(before_N),
        compressed=score(after_N),
        difference=float((after_N - before_N).mean()),
        interval=interval,
        interval_method=SCORE_METHOD if flipped else MEAN_METHOD,
        items_needed=items_needed(entry.budget),
        better=flipped[0] if flipped else None,
        worse=flipped[1] if flipped else None,
        mcnemar_p=mcnemar_p(*flipped) if flipped else None,
        budget=entry.budget,
        verdict=verdict(loss_interval(interval, higher_is_better), entry.budget, enough),
        higher_is_better=higher_is_better,
        dataset_name=task.dataset_name,
        dataset_path=task.dataset_path,
        dataset_split=task.dataset_split,
        hub_dataset=task.hub_dataset,
    )


def task_interval(before_N: Floats, after_N: Floats, seed: int) -> tuple[float, float]:
    """95% interval of the mean difference: from the flips where all scores are 0 or 1, else from the differences, with
    one that lost and one that won all that a score between 0 and 1 (or the largest that was seen) can be.
    """
    flipped = flips(before_N, after_N)
    if flipped is not None:
        low, high = paired_interval(*flipped, len(after_N))
        return float(low), float(high)
    largest = max(float(abs(before_N).max()), float(abs(after_N).max()), 1.0)
    return mean_interval(after_N - before_N, seed, spread=largest)


def _scores(task: str, key: str, items: list[Item]) -> Floats:
    for item in items:
        if not math.isfinite(item.scores.get(key, math.nan)):
            given = item.scores.get(key, "none")
            raise LLMCompressError(f"task {task}: item {item.doc_id} has no finite score for {key} (it has {given})")
    return np.array([item.scores[key] for item in items])


def text_result(entry: TextEntry, figures: TextFigures, seed: int, shared_vocabulary: int | None = None) -> TextResult:
    """One held-out text: a row for every metric, each with an interval over rows, and the verdict of the budgets."""
    rows = [_metric_row(metric, figures.by_metric[metric.name], entry, seed) for metric in TEXT_METRICS]
    return TextResult(
        name=entry.name,
        num_tokens=figures.num_tokens,
        seq_len=entry.seq_len,
        shared_vocabulary=shared_vocabulary,
        metrics=rows,
        verdict=overall(row.verdict for row in rows if row.verdict is not None),
    )


def _metric_row(metric: TextMetric, figures: RowFigures, entry: TextEntry, seed: int) -> TextFigure:
    """The mean over rows of equal length is the mean over tokens; `scale` of it is what is shown (exp: perplexity, so
    that the pair's is the ratio of two)."""
    bounded = math.isfinite(metric.least) and math.isfinite(metric.most)
    ends = mean_interval(figures.pair_N, seed, spread=(metric.most - metric.least) / entry.seq_len if bounded else 0.0)
    low, high = (metric.scale(min(max(end, metric.least), metric.most)) for end in ends)
    budget, enough = entry.budget(metric.name), len(figures.pair_N) >= MIN_ROWS
    return TextFigure(
        metric=metric.name,
        label=metric.label,
        unit=metric.unit,
        baseline=metric.scale(figures.baseline_N.mean()) if figures.baseline_N is not None else None,
        compressed=metric.scale(figures.compressed_N.mean()) if figures.compressed_N is not None else None,
        value=metric.scale(float(figures.pair_N.mean())),
        interval=(low, high),
        interval_method=MEAN_METHOD,
        same=metric.same,
        higher_is_better=metric.higher_is_better,
        budget=budget,
        verdict=None if budget is None else verdict(metric.loss((low, high)), budget, enough),
    )


def write_samples(path: Path, before: TaskRun, after: TaskRun) -> None:
    """Both models' scores and responses, one JSON line per item.

    The document itself is left out: task, split and doc_id find it, and its licence stays with it.
    """
    lines = [
        {
            "doc_id": left.doc_id,
            "digest": left.digest,
            "baseline": {"scores": left.scores, "responses": left.responses},
            "compressed": {"scores": right.scores, "responses": right.responses},
        }
        for left, right in zip(before.items, after.items, strict=True)
    ]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
