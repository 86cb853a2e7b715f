"""`.eval_results/*.yaml`: scores as the Hub's leaderboards read them, only where they truly are that benchmark.

A dataset on the Hub may be registered as a benchmark; its own eval.yaml then says which framework and which setup make
a score comparable. A score of ours is one of those only when all of it matches: the dataset, the framework, the task,
the shots, the metric, and every item. Anything less stays in the model-index, which claims nothing beyond itself.

Of the benchmarks that are registered today, each names another framework than lm-eval (BENCHMARKS), so nothing matches
and no file is written; one that names lm-eval is an entry here, and its scores go out.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from llmcompress.card.public import public
from llmcompress.report import RunReport, TaskResult

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
    return one.framework == OURS and row.hub_dataset and setup == asked
