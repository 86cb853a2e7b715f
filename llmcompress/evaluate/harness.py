"""lm-eval, the field's evaluation harness: the one file that imports it.

A task here is lm-eval's own or a YAML beside its data. What lm-eval returns is a table of means; what a paired
comparison needs is every item's score and proof that both models saw the same item. So a run keeps, for each item, its
metrics and a digest over the document and the exact prompts and continuations that the model was given.

    find_tasks(entries, folders)  ──>  Tasks      built once: data loaded, few-shot examples seeded
    run_task(task, model, tokenizer)  ──>  TaskRun    items with metrics and digests, in the order of the documents

YAMLs beside a suite name their data files relative to themselves, where lm-eval would look in the working directory;
they are made absolute on the way in. lm-eval's own catalogue (thousands of files) is read only when a task is not found
beside the suite or among the bundled ones.

lm-eval takes a task YAML for its own code. One that came with a suite is somebody else's: it is read by task_files.py,
refused where it would run Python, and its templates are rendered in a sandbox, unless remote code is trusted.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llmcompress.console import quiet
from llmcompress.errors import LLMCompressError, collected, raise_all, shown, third_party, unknown
from llmcompress.evaluate import connection
from llmcompress.evaluate.suite import TaskEntry, bundled_tasks
from llmcompress.evaluate.task_files import FILE_READERS, TaskFile, TaskFiles, code_problems
from llmcompress.models.config import special_token
from llmcompress.models.streamed import StreamedModel
from llmcompress.templates import Renderer

REMOTE = ("https://", "hf://")
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
    sandboxed: bool = False

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


def find_tasks(
    entries: Sequence[TaskEntry], folders: Sequence[Path], where: str, *, trust_remote_code: bool = False
) -> dict[tuple[str, int], ReadyTask]:
    """Load the tasks of a suite, keyed by (task, num_fewshot).

    trust_remote_code: let task YAMLs in `folders` run Python, and render their templates without a sandbox.

    Raises: LLMCompressError for every unknown task, group, metric that a task lacks or that is not a mean over items,
    for data that cannot be loaded (the first only, where no connection to the Hub can be had), and for a YAML
    that would run code without consent; all at once.
    """
    wanted = list(dict.fromkeys((entry.task, entry.num_fewshot) for entry in entries))
    if not wanted:
        return {}
    ours = [folder for folder in folders if trust_remote_code or folder == bundled_tasks()]
    theirs = TaskFiles.read([folder for folder in folders if folder not in ours])
    with quiet("lm_eval", "datasets"):
        catalogue = _catalogue([name for name, _ in wanted], ours, theirs)
        problems = _name_problems(catalogue, list(dict.fromkeys(name for name, _ in wanted)), where)
        raise_all([*problems, *(theirs.problems if problems else [])])
        raise_all(_code_problems({name: theirs.tasks[name] for name, _ in wanted if name in theirs.tasks}))
        ready: dict[tuple[str, int], ReadyTask] = {}
        data = {name: _hub_data((catalogue.task_index[name].cfg or {}).get("dataset_path")) for name, _ in wanted}
        offline = any(data.values()) and not connection.reachable()
        with connection.local_copies_only() if offline else nullcontext():
            for name, num_fewshot in wanted:
                with collected(problems):
                    try:
                        ready[name, num_fewshot] = _load(catalogue, name, num_fewshot, theirs.tasks.get(name))
                    except LLMCompressError as error:
                        if data[name] and (offline or connection.lost(error)):
                            problems.append(connection.no_data(name, data[name]))
                            break
                        raise
        raise_all(problems)
    raise_all([problem for entry in entries if (problem := _metric_problem(entry, ready, where))])
    return ready


def run_task(task: ReadyTask, model: Any, tokenizer: Any, limit: int | None, batch_size: int, seed: int) -> TaskRun:
    """Put the first `limit` documents of a task (all with None) through a loaded model.

    The few-shot examples are drawn from `seed` anew in every run, so two models get the same prompts.

    Raises: LLMCompressError when the harness cannot run the task on this model.
    """
    from lm_eval.evaluator import evaluate

    with quiet("lm_eval", "datasets"), third_party(f"task {task.name}: cannot be run"), _templates(task.sandboxed):
        task.handle.set_fewshot_seed(seed=seed)
        if isinstance(model, StreamedModel):
            language_model = streamed_lm(model, tokenizer, batch_size)
        else:
            language_model = _language_model(model, tokenizer, batch_size)
        results = evaluate(
            lm=language_model, task_dict={"tasks": {task.name: task.handle}}, limit=limit, bootstrap_iters=0
        )
    return TaskRun(task=task.name, items=_items(results["samples"][task.name]))


def streamed_lm(model: StreamedModel, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's view of a streamed model: HFLM, with the requests of a task put through it in one pass."""
    from lm_eval import utils
    from lm_eval.models.huggingface import HFLM

    from llmcompress.evaluate.streamed_lm import StreamedRequests

    def windows(tokens: list[int], first: int, longest: int) -> Iterator[tuple[list[int], list[int]]]:
        return map(utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, first, longest, 1))

    kind = type("StreamedLM", (StreamedRequests, HFLM), {"streamed": model, "windows": staticmethod(windows)})
    return kind(pretrained=model.model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


def refuse_generation(tasks: Iterable[ReadyTask]) -> None:
    """Raise for every task in which the model writes text, where it is streamed.

    Raises: LLMCompressError naming each.
    """
    from llmcompress.evaluate.streamed_lm import NEEDS_MEMORY

    hint = "leave it out of the suite, or evaluate where the model fits"
    writing = [task.name for task in tasks if getattr(task.handle, "OUTPUT_TYPE", None) == "generate_until"]
    raise_all([LLMCompressError(f"task {name}: {NEEDS_MEMORY}", hint) for name in writing])


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's own for a loaded model, also where the tokenizer has no token to begin or end a text with.

    lm-eval takes a tokenizer's `eos_token` to stop at, and `bos_token` or that one before a text without context. A
    tokenizer of neither (characters, bytes) has what the model's config names; where that names none, only a task that
    needs such a token ends in an error. For padding it would add a token, which the model has no row for: any other
    does, since padding is masked.
    """
    from lm_eval.models.huggingface import HFLM

    def special(*names: str) -> int:
        own = (getattr(tokenizer, name, None) for name in names)
        ids = [*own, *(special_token(model.config, name) for name in names)]
        found = next((each for each in ids if each is not None), None)
        if found is None:
            raise LLMCompressError(
                f"the tokenizer has no {' and no '.join(name.removesuffix('_id') for name in names)}, nor does "
                "config.json name one, and this task needs it",
                "name one in tokenizer_config.json, or leave the task out",
            )
        return int(found)

    class LanguageModel(HFLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return special("eos_token_id")

        @property
        def prefix_token_id(self) -> int:
            return special("bos_token_id", "eos_token_id")

    if all(getattr(tokenizer, name, None) is None for name in ("pad_token_id", "unk_token_id", "eos_token_id")):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return LanguageModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


@contextmanager
def _templates(sandboxed: bool) -> Iterator[None]:
    """Let lm-eval render the templates of a task that is not its own in a sandbox, as long as the block lasts."""
    if not sandboxed:
        yield
        return
    from lm_eval import utils

    own = utils.apply_template
    with Renderer() as renderer:
        utils.apply_template = renderer.render
        try:
            yield
        finally:
            utils.apply_template = own


def num_items(task: ReadyTask, limit: int | None) -> int:
    """How many documents of a task are run: all of them, or `limit`."""
    with third_party(f"task {task.name}: its items cannot be read"):
        documents = task.handle.eval_docs
        number = len(documents) if hasattr(documents, "__len__") else sum(1 for _ in documents)
    return number if limit is None else min(number, limit)


def item_texts(task: ReadyTask, limit: int | None) -> list[str]:
    """The first `limit` documents of a task as a reader would meet them: the question with its right answer."""
    handle = task.handle
    found = []
    with third_party(f"task {task.name}: its items cannot be read"), _templates(task.sandboxed):
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


def _catalogue(names: Sequence[str], ours: Sequence[Path], theirs: TaskFiles) -> Any:
    """lm-eval's index of tasks: those in the folders `ours`, then its own, under those that came with the suite."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex

    paths: list[str | Path] = list(ours)
    catalogue = TaskManager(include_path=paths, include_defaults=False)
    if not set(names) <= {*catalogue.task_index, *theirs.tasks}:
        catalogue = TaskManager(include_path=paths)
    for name, file in theirs.tasks.items():
        catalogue.task_index[name] = TaskIndex.entry_from_config(
            file.config
        )  # with its values, so nothing is read again
    return catalogue


def _code_problems(tasks: Mapping[str, TaskFile]) -> list[LLMCompressError]:
    """What tasks that came with the suite would run beside lm-eval's own code."""
    from lm_eval.api import metrics, registry

    assert metrics  # its import fills the registries
    known = set(registry.METRIC_REGISTRY.keys()), set(registry.AGGREGATION_REGISTRY.keys())
    return [problem for task in tasks.values() for problem in code_problems(task, *known)]


def _name_problems(catalogue: Any, names: Sequence[str], where: str) -> list[LLMCompressError]:
    problems = []
    for name in names:
        entry = catalogue.task_index.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, [*catalogue.all_subtasks, *catalogue.task_index], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists those that come with the harness"
            known = f"not among the {len(catalogue.all_subtasks)} known"
            problems.append(LLMCompressError(f"{where}: unknown task {name!r}, {known}", hint))
        elif entry.kind.name in ("GROUP", "TAG"):
            problems.append(LLMCompressError(f"{where}: {name!r} is a group of tasks", "name its tasks one by one"))
    return problems


def _load(catalogue: Any, name: str, num_fewshot: int, file: TaskFile | None) -> ReadyTask:
    entry = catalogue.task_index[name]
    yaml_path = file.path if file else entry.yaml_path
    member: dict[str, Any] = {"task": name, "num_fewshot": num_fewshot}
    declared = entry.cfg or {}
    files: list[Path] = []
    kwargs = declared.get("dataset_kwargs") or {}
    if yaml_path is not None and "data_files" in kwargs:
        member["dataset_kwargs"] = {**kwargs, "data_files": _absolute(kwargs["data_files"], yaml_path, files)}
    problem = f"task {name} ({yaml_path or 'its Python class'}): cannot be loaded"
    with third_party(problem), _templates(file is not None):
        handle = catalogue.load([{"group": GROUP, "task": [member]}])["tasks"][name]
        handle.set_config(key="num_fewshot", value=num_fewshot)
        return _ready(name, num_fewshot, handle, files, declared, sandboxed=file is not None)


def _ready(
    name: str, num_fewshot: int, handle: Any, files: list[Path], declared: Mapping[str, Any], *, sandboxed: bool
) -> ReadyTask:
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
        sandboxed=sandboxed,
    )


def _absolute(data_files: Any, yaml_path: Path, found: list[Path]) -> Any:
    """`data_files` with relative paths resolved against the YAML's folder; `found` collects the local files.

    Raises: LLMCompressError for a file that is missing or empty.
    """
    if isinstance(data_files, Mapping):
        return {split: _absolute(part, yaml_path, found) for split, part in data_files.items()}
    if isinstance(data_files, list):
        return [_absolute(part, yaml_path, found) for part in data_files]
    if not isinstance(data_files, str):
        raise LLMCompressError(f"{yaml_path}: data_files: must be file names, not {shown(data_files)}")
    if data_files.startswith(REMOTE):
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


def _hub_data(path: Any) -> str | None:
    """The dataset of the Hub that a task reads, or None where it reads files."""
    return None if path is None or path in FILE_READERS or Path(str(path)).exists() else str(path)
