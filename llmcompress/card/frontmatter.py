"""The YAML at the head of a model card: what the Hub, its search and its leaderboards read.

    base_model, base_model_relation   only when the source is on the Hub: a local path there fails the upload
    library_name, pipeline_tag        what loads it and what it does
    license, language                 as the source states them
    datasets                          those of the Hub that it was trained on
    tags                              layout, method and width, as people search for them
    model-index                       every measured score

The Hub checks a card when it is uploaded; `problems` applies the same rules here, without a network. The model-index is
grouped by dataset and split as huggingface_hub groups it, and shots stand with the metric, not with the dataset, whose
arguments that grouping would drop.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from llmcompress.card.kind import KINDS, kind_of_card
from llmcompress.card.licences import KNOWN, licence_fields
from llmcompress.card.public import datasets
from llmcompress.report import RunReport, TaskResult, TextResult

PIPELINE = "text-generation"
PIPELINES = {
    "causal": PIPELINE,
    "masked": "fill-mask",
    "classification": "text-classification",
    "embedding": "sentence-similarity",
}
"""Of a student, by its kind."""
RELATIONS = ("adapter", "merge", "quantized", "finetune")
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


def front_matter(report: RunReport, name: str) -> dict[str, Any]:
    """The metadata of the card of a checkpoint called `name`; a field that is not known is absent."""
    front: dict[str, Any] = {}
    source, kind = report.source, kind_of_card(report)
    if source and source.hub_id:
        front |= {"base_model": source.hub_id, "base_model_relation": kind.relation if kind else "quantized"}
    front |= {
        "library_name": kind.library if kind else "transformers",
        "pipeline_tag": _pipeline(report),
    }
    if source:
        front |= licence_fields(source)
        languages = [language for language in source.languages if _LANGUAGE.fullmatch(language)]
        front |= {"language": languages} if languages else {}
    front |= {"datasets": datasets(report)} if datasets(report) else {}
    front["tags"] = _tags(report)
    results = _results(report)
    return front | ({"model-index": [{"name": name, "results": results}]} if results else {})


def _pipeline(report: RunReport) -> str:
    """What it does: what the source says of itself, or what its kind of student is for."""
    stated = report.source.pipeline_tag if report.source else None
    return stated or (PIPELINES[report.distillation.kind] if report.distillation else PIPELINE)


def as_text(front: Mapping[str, Any]) -> str:
    """The block between its two rules, ready to stand at the head of README.md."""
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=10_000)}---\n"


def problems(front: Mapping[str, Any]) -> list[str]:
    """What the Hub would refuse, one line each; empty for metadata that it takes."""
    found = [f"{path}: is empty" for path, value in _leaves(front, "") if value in (None, "", [], {})]
    for identifier in [front["base_model"]] if "base_model" in front else []:
        if not isinstance(identifier, str) or not _HUB_ID.fullmatch(identifier):
            found.append(f"base_model: {identifier!r} is no Hub id")
    if front.get("base_model_relation", "quantized") not in RELATIONS:
        found.append(f"base_model_relation: must be one of {', '.join(RELATIONS)}")
    licence = front.get("license")
    if licence is not None and licence not in KNOWN | {"other"}:
        found.append(f"license: {licence!r} is not on the Hub's list; use other with license_name")
    if licence == "other" and "license_name" not in front:
        found.append("license: other needs license_name")
    if not str(front.get("license_link", "https://")).startswith(("https://", "http://")):
        found.append("license_link: must be an address")
    found += [f"language: {one!r} is no ISO 639 code" for one in front.get("language", []) if not _is_language(one)]
    return found + [problem for index in front.get("model-index", []) for problem in _index_problems(index)]


def _is_language(value: object) -> bool:
    return isinstance(value, str) and bool(_LANGUAGE.fullmatch(value))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Everything without parts, and every collection that is empty, each with the way to it."""
    parts = list(value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ())
    if not parts:
        yield path, value
    for key, one in parts:
        yield from _leaves(one, f"{path}.{key}" if path else str(key))


def _index_problems(index: Mapping[str, Any]) -> Iterator[str]:
    if not index.get("name"):
        yield "model-index: has no name"
    for result in index.get("results", []):
        if not result.get("task", {}).get("type"):
            yield "model-index: a result has no task.type"
        if not {"type", "name"} <= set(result.get("dataset", {})):
            yield "model-index: a dataset needs type and name"
        for metric in result.get("metrics", []):
            value = metric.get("value")
            if not metric.get("type") or not isinstance(value, int | float) or not math.isfinite(value):
                yield f"model-index: a metric needs a type and a finite value, got {metric}"


def _tags(report: RunReport) -> list[str]:
    return list(dict.fromkeys(["llmcompress", *(tag for kind in KINDS for tag in kind.tags(report))]))


def _results(report: RunReport) -> list[dict[str, Any]]:
    """The model-index entries: one per dataset and split, with every metric taken on it."""
    grouped: dict[tuple[str, ...], dict[str, Any]] = {}
    for evaluation in report.evaluations:
        for dataset, metric in [*map(_of_task, evaluation.tasks), *map(_of_text, evaluation.texts)]:
            key = tuple(str(dataset.get(part)) for part in ("type", "config", "split"))
            entry = {"task": {"type": PIPELINE, "name": "Text Generation"}, "dataset": dataset, "metrics": []}
            metrics = grouped.setdefault(key, entry)["metrics"]
            metrics += [metric] if metric not in metrics else []
    return list(grouped.values())


def _of_task(row: TaskResult) -> tuple[dict[str, Any], dict[str, Any]]:
    known = row.hub_dataset and row.dataset_path
    dataset = {"name": row.dataset_path if known else row.task, "type": row.dataset_path if known else row.task}
    if known and row.dataset_name:
        dataset["config"] = row.dataset_name
    if row.dataset_split:
        dataset["split"] = row.dataset_split
    metric, _, variant = row.metric.partition(",")
    name = f"{row.task} {metric}{f' ({variant})' if variant else ''}, {row.num_fewshot}-shot"
    args = {"num_fewshot": row.num_fewshot, "num_items": row.num_items}
    return dataset, {"type": metric, "value": row.compressed.value, "name": name, "args": args}


def _of_text(row: TextResult) -> tuple[dict[str, Any], dict[str, Any]]:
    args = {"num_tokens": row.num_tokens, "seq_len": row.seq_len}
    value = row.compressed_perplexity
    metric = {"type": "perplexity", "value": value, "name": f"{row.name} perplexity", "args": args}
    return {"name": row.name, "type": row.name}, metric
