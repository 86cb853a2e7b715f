"""lm-eval, the field's evaluation harness: the one file that imports it.

A task here is lm-eval's own or a YAML beside its data. What lm-eval returns is a table of means; what a paired
comparison needs is every item's score and proof that both models saw the same item. So a run keeps, for each item, its
metrics and a digest over the document and the exact prompts and continuations that the model was given.

    find_tasks(entries, folders)  ──>  Tasks      built once: data loaded, few-shot examples seeded
    run_task(task, model, tokenizer)  ──>  TaskRun    items with metrics and digests, in the order of the documents

Bundled YAMLs name their data files relative to themselves, which lm-eval would look for in the working directory; they
are made absolute on the way in. lm-eval's own catalogue (thousands of files) is read only when a task is not found
among the bundled ones.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmcompress.console import quiet
from llmcompress.errors import LLMCompressError, raise_all, unknown
from llmcompress.evaluate.suite import TaskEntry

FILE_READERS = ("json", "csv", "parquet", "arrow", "text", "pandas")
GROUP = "llmcompress"


class Item(BaseModel):
    """One document's outcome: `scores` maps `metric,filter` to its value, `responses` is what the model answered."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    doc_id: int
    digest: str
    scores: dict[str, float]
    responses: dict[str, Any]


class TaskRun(BaseModel):
    """One task through one model."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    task: str
    items: list[Item]


@dataclass(frozen=True, slots=True)
class ReadyTask:
    """A task that is loaded and checked. `handle` is lm-eval's own object; nobody outside this file looks into it."""

    name: str
    num_fewshot: int
    handle: Any
    filters: tuple[str, ...]
    higher_is_better: Mapping[str, bool]
    dataset_name: str | None
    dataset_path: str | None
    dataset_split: str | None
    hub_dataset: bool
    digest: str

    def score_key(self, metric: str) -> str:
        """The key of `metric` in an item's scores: with the filter that it names, or the task's first.

        >>> ReadyTask("t", 0, None, ("none",), {}, None, None, None, False, "").score_key("acc")
        'acc,none'
        """
        name, _, chosen = metric.partition(",")
        return f"{name},{chosen or self.filters[0]}"


def harness_version() -> str:
    """The harness and its version, as the report names it."""
    return f"lm-eval {version('lm_eval')}"


def find_tasks(entries: Sequence[TaskEntry], folders: Sequence[Path], where: str) -> dict[tuple[str, int], ReadyTask]:
    """Load the tasks of a suite, keyed by (task, num_fewshot).

    Raises: LLMCompressError for every unknown task, group, metric that a task lacks or that is not a mean over items,
    and for data that cannot be loaded; all at once.
    """
    wanted = list(dict.fromkeys((entry.task, entry.num_fewshot) for entry in entries))
    if not wanted:
        return {}
    with quiet("lm_eval", "datasets"):
        catalogue = _catalogue([name for name, _ in wanted], folders)
        problems = _name_problems(catalogue, list(dict.fromkeys(name for name, _ in wanted)), where)
        raise_all(problems)
        ready: dict[tuple[str, int], ReadyTask] = {}
        for name, num_fewshot in wanted:
            try:
                ready[name, num_fewshot] = _load(catalogue, name, num_fewshot)
            except LLMCompressError as error:
                problems.append(error)
        raise_all(problems)
    raise_all([problem for entry in entries if (problem := _metric_problem(entry, ready, where))])
    return ready


def run_task(task: ReadyTask, model: Any, tokenizer: Any, limit: int | None, batch_size: int, seed: int) -> TaskRun:
    """Put the first `limit` documents of a task (all with None) through a loaded model.

    The few-shot examples are drawn from `seed` anew in every run, so two models get the same prompts.

    Raises: LLMCompressError when the harness cannot run the task on this model.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet("lm_eval", "datasets"):
        task.handle.set_fewshot_seed(seed=seed)
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        try:
            results = evaluate(
                lm=language_model, task_dict={"tasks": {task.name: task.handle}}, limit=limit, bootstrap_iters=0
            )
        except ValueError as error:
            raise LLMCompressError(f"task {task.name}: {_first_line(error)}") from error
    return TaskRun(task=task.name, items=_items(results["samples"][task.name]))


def item_texts(task: ReadyTask, limit: int | None) -> list[str]:
    """The first `limit` documents of a task as a reader would meet them: the question with its right answer."""
    handle = task.handle
    found = []
    for number, document in enumerate(handle.eval_docs):
        if limit is not None and number >= limit:
            break
        found.append(" ".join(part for part in _spoken(handle, document) if isinstance(part, str)))
    return found


def _spoken(handle: Any, document: Any) -> Iterable[Any]:
    """Question and answer of a document; for a choice by number, the choice."""
    question, answer = handle.doc_to_text(document), handle.doc_to_target(document)
    choices = handle.doc_to_choice(document) if getattr(handle.config, "doc_to_choice", None) is not None else None
    if isinstance(answer, int) and choices:
        answer = choices[answer]
    if isinstance(question, int) and choices:
        question = choices[question]
    yield question
    yield from answer if isinstance(answer, list) else [answer]


def _items(samples: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Merge lm-eval's samples, one for each document and filter, into one item a document."""
    items: dict[int, Item] = {}
    for sample in samples:
        item = items.get(sample["doc_id"])
        if item is None:
            seen = json.dumps([sample["doc_hash"], sample["arguments"], sample["target"]], default=str)
            digest = hashlib.sha256(seen.encode()).hexdigest()
            item = items[sample["doc_id"]] = Item(doc_id=sample["doc_id"], digest=digest, scores={}, responses={})
        for metric in sample["metrics"]:
            if _is_number(sample[metric]):
                item.scores[f"{metric},{sample['filter']}"] = float(sample[metric])
        item.responses[sample["filter"]] = json.loads(json.dumps(sample["filtered_resps"], default=str))
    return [items[doc_id] for doc_id in sorted(items)]


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__float__")


def _catalogue(names: Sequence[str], folders: Sequence[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    paths: list[str | Path] = list(folders)
    bundled = TaskManager(include_path=paths, include_defaults=False)
    return bundled if set(names) <= set(bundled.task_index) else TaskManager(include_path=paths)


def _name_problems(catalogue: Any, names: Sequence[str], where: str) -> list[LLMCompressError]:
    problems = []
    for name in names:
        entry = catalogue.task_index.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, catalogue.all_subtasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists those that come with the harness"
            known = f"not among the {len(catalogue.all_subtasks)} known"
            problems.append(LLMCompressError(f"{where}: unknown task {name!r}, {known}", hint))
        elif entry.kind.name in ("GROUP", "TAG"):
            problems.append(LLMCompressError(f"{where}: {name!r} is a group of tasks", "name its tasks one by one"))
    return problems


def _load(catalogue: Any, name: str, num_fewshot: int) -> ReadyTask:
    from datasets.exceptions import DatasetsError

    entry = catalogue.task_index[name]
    member: dict[str, Any] = {"task": name, "num_fewshot": num_fewshot}
    declared = entry.cfg or {}
    files: list[Path] = []
    kwargs = declared.get("dataset_kwargs") or {}
    if entry.yaml_path is not None and "data_files" in kwargs:
        member["dataset_kwargs"] = {**kwargs, "data_files": _absolute(kwargs["data_files"], entry.yaml_path, files)}
    try:
        handle = catalogue.load([{"group": GROUP, "task": [member]}])["tasks"][name]
        handle.set_config(key="num_fewshot", value=num_fewshot)
    except (DatasetsError, OSError, ValueError, TypeError, KeyError, ImportError) as error:
        place = entry.yaml_path or "its Python class"
        message = f"task {name} ({place}): cannot be loaded ({type(error).__name__}: {_first_line(error)})"
        raise LLMCompressError(message, _load_hint(declared)) from error
    return _ready(name, num_fewshot, handle, files, declared)


def _ready(name: str, num_fewshot: int, handle: Any, files: list[Path], declared: Mapping[str, Any]) -> ReadyTask:
    config = handle.config
    path = getattr(handle, "DATASET_PATH", None)
    local = bool(files) or path in FILE_READERS or (path is not None and Path(path).exists())
    content = hashlib.sha256(json.dumps(declared, sort_keys=True, default=str).encode())
    for file in files:
        content.update(hashlib.sha256(file.read_bytes()).digest())
    return ReadyTask(
        name=name,
        num_fewshot=num_fewshot,
        handle=handle,
        filters=tuple(ensemble.name for ensemble in getattr(handle, "_filters", ())) or ("none",),
        higher_is_better=handle.higher_is_better(),
        dataset_name=getattr(handle, "DATASET_NAME", None),
        dataset_path=path,
        dataset_split=config.test_split or config.validation_split,
        hub_dataset=path is not None and not local and not callable(config.custom_dataset),
        digest=content.hexdigest(),
    )


def _absolute(data_files: Any, yaml_path: Path, found: list[Path]) -> Any:
    """`data_files` with relative paths resolved against the YAML's folder; `found` collects the local files.

    Raises: LLMCompressError for a file that is missing or empty.
    """
    if isinstance(data_files, Mapping):
        return {split: _absolute(part, yaml_path, found) for split, part in data_files.items()}
    if isinstance(data_files, list):
        return [_absolute(part, yaml_path, found) for part in data_files]
    if "://" in data_files:
        return data_files
    path = (yaml_path.parent / data_files).resolve()
    if not path.is_file():
        raise LLMCompressError(f"{yaml_path}: data_files: {path} not found (paths are relative to the YAML's folder)")
    if not path.stat().st_size:
        raise LLMCompressError(f"{yaml_path}: data_files: {path} is empty")
    found.append(path)
    return str(path)


def _metric_problem(
    entry: TaskEntry, ready: Mapping[tuple[str, int], ReadyTask], where: str
) -> LLMCompressError | None:
    from lm_eval.api.metrics import mean, nanmean

    task = ready[entry.task, entry.num_fewshot]
    aggregation = task.handle.aggregation()
    name, _, chosen = entry.metric.partition(",")
    place = f"{where}: task {entry.task}"
    if name not in aggregation:
        return unknown("metric", name, aggregation, place)
    if chosen and chosen not in task.filters:
        return unknown("filter", chosen, task.filters, place)
    if aggregation[name] not in (mean, nanmean):
        usable = ", ".join(sorted(key for key, how in aggregation.items() if how in (mean, nanmean)))
        return LLMCompressError(
            f"{place}: metric {name} is not a mean over items, so it has no pairs to compare",
            f"metrics of this task that are: {usable or 'none'}",
        )
    return None


def _load_hint(declared: Mapping[str, Any]) -> str | None:
    path = declared.get("dataset_path")
    if path is None or path in FILE_READERS:
        return None
    return f"its data is {path} on the Hugging Face Hub: a first run needs a network, later ones use the local copy"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
