"""The YAML at the head of a model card: what the Hub, its search and its leaderboards read.

    base_model, base_model_relation   only when the source is on the Hub: a local path there fails the upload
    library_name, pipeline_tag        what loads it and what it does
    license, language                 as the source states them
    datasets                          those of the Hub that it was trained on
    tags                              layout, method and width, as people search for them
    model-index                       every score measured on items enough for a verdict

The Hub checks a card when it is uploaded; `problems` applies the same rules here, without a network. The model-index is
grouped by dataset and split as huggingface_hub groups it, and shots stand with the metric, not with the dataset, whose
arguments that grouping would drop.

`.eval_results/*.yaml` is what leaderboards read. A dataset on the Hub may be registered as a benchmark; its own
eval.yaml then says which framework and which setup make a score comparable. A score is written there only when all of
it matches: dataset, framework, task, shots, metric, and every item. Of the benchmarks registered today each names
another framework than lm-eval (BENCHMARKS), so no file is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from llmcompress.card.public import datasets, public
from llmcompress.card.view import kind, schemes, title
from llmcompress.report import RunReport, Source, TaskResult, TextResult

PIPELINE = "text-generation"
PIPELINES = {
    "causal": PIPELINE,
    "masked": "fill-mask",
    "classification": "text-classification",
    "embedding": "sentence-similarity",
}
"""Of a student, by its kind."""
RELATIONS = {"quantized": "quantized", "adapter": "adapter", "merged": "finetune", "distilled": "finetune"}
"""base_model_relation of a kind of output."""
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


def front_matter(report: RunReport) -> dict[str, Any]:
    """The metadata of the card of a report; a field that is not known is absent."""
    source, base_model = report.source, report.card.base_model or (report.source and report.source.hub_id)
    made = kind(report)
    front: dict[str, Any] = {}
    if base_model:
        front |= {"base_model": base_model, "base_model_relation": RELATIONS[made or "quantized"]}
    stated = source.pipeline_tag if source else None
    front["library_name"] = "peft" if made == "adapter" else "transformers"
    front["pipeline_tag"] = stated or (PIPELINES[report.distillation.kind] if report.distillation else PIPELINE)
    front |= license_fields(report)
    languages = [language for language in (source.languages if source else []) if _LANGUAGE.fullmatch(language)]
    front |= {"language": languages} if languages else {}
    front |= {"datasets": datasets(report)} if datasets(report) else {}
    front["tags"] = list(dict.fromkeys(["llmcompress", *_tags(report), *report.card.tags]))
    results = _results(report)
    return front | ({"model-index": [{"name": title(report), "results": results}]} if results else {})


def as_text(front: Mapping[str, Any]) -> str:
    """The block between its two rules, ready to stand at the head of README.md."""
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=10_000)}---\n"


def problems(front: Mapping[str, Any]) -> list[str]:
    """What the Hub would refuse, one line each; empty for metadata that it takes."""
    found = [f"{path}: is empty" for path, value in _leaves(front, "") if value in (None, "", [], {})]
    for identifier in [front["base_model"]] if "base_model" in front else []:
        if not isinstance(identifier, str) or not _HUB_ID.fullmatch(identifier):
            found.append(f"base_model: {identifier!r} is no Hub id")
    if front.get("base_model_relation", "quantized") not in RELATIONS.values():
        found.append(f"base_model_relation: must be one of {', '.join(sorted(set(RELATIONS.values())))}")
    license = front.get("license")
    if license is not None and license not in LICENSES | {"other"}:
        found.append(f"license: {license!r} is not on the Hub's list; use other with license_name")
    if license == "other" and "license_name" not in front:
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


def _tags(report: RunReport) -> Iterator[str]:
    """What was done, the format, the width, the grid and the method, as people search for them."""
    made, output = kind(report), report.output
    if made == "quantized" and output is not None:
        yield from ("quantized", output.format.replace("_", "-"))
        for row in report.linears:
            if row.outcome != "skipped" and row.grid:
                bits = row.grid["num_bits"]
                yield from (f"{bits}-bit", str(row.grid["codebook"] or f"int{bits}"))
                if row.method and row.outcome == "quantized":
                    yield row.method
        yield from (scheme.lower() for scheme in schemes(report) if scheme.startswith("W"))
    if report.finetune is not None:
        yield from (*(["peft"] if made == "adapter" else []), "lora", report.finetune.adapter)
    if report.merge is not None:
        yield "merged-adapter"
    if report.distillation is not None:
        yield "distillation"


def _results(report: RunReport) -> list[dict[str, Any]]:
    """The model-index entries: one per dataset and split, with every metric taken on items enough for a verdict."""
    grouped: dict[tuple[str, ...], dict[str, Any]] = {}
    for evaluation in report.evaluations:
        for dataset, metric in [
            *(_of_task(row) for row in evaluation.tasks if row.enough),
            *(_of_text(row) for row in evaluation.texts if row.enough),
        ]:
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


LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl lgpl-2.1
    lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
    ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)


def license_fields(report: RunReport) -> dict[str, str]:
    """`license`, and for one that the Hub does not know `license_name` and `license_link`; empty where none is stated.

    A link that is a file of the source's repository is made whole; one that leads nowhere from here is left out.
    """
    source = report.source
    stated = report.card.license or (source.license if source else None)
    if stated is None:
        return {}
    if stated.strip().lower() in LICENSES:
        return {"license": stated.strip().lower()}
    known = source if source and source.license == stated else None
    name = (known and known.license_name) or (stated if stated.lower() != "other" else "see-base-model")
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "unnamed"
    link = _whole_link(known) if known else None
    return {"license": "other", "license_name": slug} | ({"license_link": link} if link else {})


def _whole_link(source: Source) -> str | None:
    link = source.license_link
    if link is None or link.startswith(("https://", "http://")):
        return link
    if source.hub_id is None:
        return None
    return f"https://huggingface.co/{source.hub_id}/blob/{source.revision or 'main'}/{link.removeprefix('./')}"


OURS = "lm-eval"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A registered benchmark and the setup that its eval.yaml asks for. num_items: of the whole split."""

    dataset_id: str
    task_id: str
    framework: str
    task: str = ""
    metric: str = ""
    num_fewshot: int = 0
    num_items: int = 0


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("openai/gsm8k", "gsm8k", "inspect-ai"),
    Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", "inspect-ai"),
    Benchmark("Idavidrein/gpqa", "diamond", "inspect-ai"),
    Benchmark("cais/hle", "hle", "inspect-ai"),
)
"""Registered benchmarks and their framework, from the Hub's documentation of evaluation results."""


def eval_results(report: RunReport, known: tuple[Benchmark, ...] = BENCHMARKS) -> dict[str, str]:
    """File name -> YAML for every score that is a registered benchmark's, in full."""
    found: dict[str, str] = {}
    for evaluation in public(report).evaluations:
        for row in evaluation.tasks:
            for one in known:
                if _matches(row, one):
                    notes = f"{evaluation.harness}, {row.num_fewshot}-shot, run by {evaluation.engine}"
                    entry = {
                        "dataset": {"id": one.dataset_id, "task_id": one.task_id},
                        "value": row.compressed.value,
                        "date": report.created[:10],
                        "notes": notes,
                    }
                    found[f".eval_results/{one.task_id}.yaml"] = yaml.safe_dump([entry], sort_keys=False)
    return found


def _matches(row: TaskResult, one: Benchmark) -> bool:
    setup = (row.dataset_path, row.task, row.metric, row.num_fewshot, row.num_items)
    asked = (one.dataset_id, one.task, one.metric, one.num_fewshot, one.num_items)
    return one.framework == OURS and row.enough and row.hub_dataset and setup == asked
