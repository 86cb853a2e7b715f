"""A suite: which tasks and texts are measured, and how much each may lose. Declared in YAML, read here.

    name: tiny
    description: What the bundled checkpoint can do.
    tasks:
      - {task: tiny_cloze, metric: acc, num_fewshot: 0, limit: null, budget: 0.02}
    texts:
      - {name: stories, file: ../data/stories.txt, seq_len: 256, num_tokens: 20000, budget_kl: 0.05}

A budget is the largest *loss* that is accepted: points of the metric, nats of KL per token, or a ratio of perplexities.
A text without any budget is measured and cannot fail.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from llmcompress.config.yaml_lines import Located, read_yaml
from llmcompress.errors import LLMCompressError, raise_all, shown, unknown
from llmcompress.resources import folder

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ENDINGS = (".yaml", ".yml")
TEXT_ENDINGS = (".txt", ".jsonl")
Name = Annotated[str, Field(min_length=1)]


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskEntry(_Declared):
    """One task and metric. `metric` is lm-eval's name, `acc`, or `exact_match,FILTER` where a task has filters."""

    task: Name
    metric: Name = "acc"
    num_fewshot: int = Field(default=0, ge=0)
    limit: int | None = Field(default=None, ge=2, description="items at most, the first ones")
    budget: float = Field(default=0.02, ge=0, allow_inf_nan=False, description="largest accepted loss, metric's unit")


class TextEntry(_Declared):
    """One held-out text, `file` relative to the suite's own folder."""

    name: Name
    file: Name
    field: Name = "text"
    seq_len: int = Field(default=256, ge=2)
    num_tokens: int = Field(default=20000, ge=2, description="at most")
    budget_kl: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="nats per token")
    budget_perplexity_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    budgets: dict[Name, float] = Field(default={}, description="of other text metrics, by name: the largest loss")

    def budget(self, metric: str) -> float | None:
        """The largest accepted loss of a text metric; None: it is measured and cannot fail."""
        named = {"kl": self.budget_kl, "perplexity": self.budget_perplexity_ratio}
        return named[metric] if named.get(metric) is not None else self.budgets.get(metric)


class Suite(_Declared):
    """A suite as declared; `path` is the YAML that it was read from."""

    name: Name
    description: str = ""
    tasks: tuple[TaskEntry, ...] = ()
    texts: tuple[TextEntry, ...] = ()
    _path: Path | None = PrivateAttr(default=None)

    @property
    def where(self) -> str:
        """What an error calls it: the file that it was read from, or --tasks."""
        return str(self._path or "--tasks")

    def text_path(self, entry: TextEntry) -> Path:
        """Where the file of a text lies."""
        assert self._path is not None, "texts are declared in a file"
        return self._path.parent / entry.file

    def digest(self) -> str:
        """sha256 over the declaration and the bytes of its texts."""
        sha = hashlib.sha256(self._path.read_bytes() if self._path else self.model_dump_json().encode())
        for entry in self.texts:
            sha.update(hashlib.sha256(self.text_path(entry).read_bytes()).digest())
        return sha.hexdigest()

    def task_folders(self) -> list[Path]:
        """Folders that may hold task YAMLs: the bundled ones, then the suite's own where it is not a bundled suite."""
        own = [self._path.parent] if self._path else []
        return [path for path in (bundled_tasks(), *own) if path.is_dir() and path != suites_folder()]


def suites_folder() -> Path:
    """Where the bundled suites lie."""
    return folder("eval") / "suites"


def bundled_tasks() -> Path:
    """Where the bundled tasks lie."""
    return folder("eval") / "tasks"


def suite_names() -> list[str]:
    """Names of the bundled suites, sorted."""
    return sorted(path.stem for path in suites_folder().glob("*.yaml"))


def chosen_suite(name: str | None, tasks: Sequence[str]) -> Suite:
    """The suite called `name`, or where there is none one of `tasks`, each TASK or TASK:METRIC with the usual budget.

    Raises: LLMCompressError, as `load_suite`, and for a task without a name or named twice.
    """
    if name is not None:
        return load_suite(name)
    declared = [task.partition(":") for task in tasks]
    raise_all(
        [
            LLMCompressError(f"--tasks: {shown(task)}: must be TASK or TASK:METRIC")
            for task, (first, colon, metric) in zip(tasks, declared, strict=True)
            if not first or (colon and not metric)
        ]
    )
    entries = [TaskEntry(task=task, metric=metric or "acc") for task, _, metric in declared]
    suite = Suite(name=" + ".join(entry.task for entry in entries), tasks=tuple(entries))
    raise_all(_cross_checks(suite))
    return suite


def load_suite(name: str) -> Suite:
    """The bundled suite called `name`, or the one in the YAML file at the path `name`.

    Raises: LLMCompressError, one for each problem of the file and all of them at once; for an unknown name, with the
    nearest one.
    """
    path = _locate(name)
    declared = read_yaml(path)
    try:
        suite = Suite.model_validate(declared.data)
    except ValidationError as error:
        raise_all([_problem(declared, detail) for detail in error.errors(include_url=False)])
        raise
    suite._path = path
    raise_all(_cross_checks(suite))
    return suite


def _locate(name: str) -> Path:
    if name.endswith(ENDINGS) or "/" in name:
        path = Path(name).expanduser().resolve()
        if not path.is_file():
            raise LLMCompressError(
                f"{name}: no such suite file", f"bundled suites: {', '.join(suite_names()) or 'none'}"
            )
        return path
    if name not in suite_names():
        raise unknown("suite", name, suite_names())
    return suites_folder() / f"{name}.yaml"


def _problem(declared: Located, detail: ErrorDetails) -> LLMCompressError:
    place = detail["loc"]
    where = declared.where(place)
    if detail["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {"tasks": TaskEntry, "texts": TextEntry}
        model = models.get(str(place[0]), Suite) if len(place) > 1 else Suite
        inside = f": {'.'.join(map(str, place[:-1]))}" if place[:-1] else ""
        return unknown("key", str(place[-1]), model.model_fields, where + inside)
    given = "" if detail["type"] == "missing" else f", got {shown(repr(detail['input']))}"
    return LLMCompressError(f"{where}: {'.'.join(map(str, place))}: {detail['msg']}{given}")


def _cross_checks(suite: Suite) -> list[LLMCompressError]:
    found = [] if suite.tasks or suite.texts else ["neither tasks nor texts: nothing would be measured"]
    tasks = Counter((entry.task, entry.metric, entry.num_fewshot) for entry in suite.tasks)
    found += [f"tasks: {key[0]}, {key[1]}, {key[2]} shots is listed {n} times" for key, n in tasks.items() if n > 1]
    texts = Counter(entry.name for entry in suite.texts)
    found += [f"texts: the name {name!r} is used {n} times" for name, n in texts.items() if n > 1]
    for index, entry in enumerate(suite.texts):
        file = suite.text_path(entry)
        if file.suffix not in TEXT_ENDINGS:
            found.append(f"texts.{index}.file: {entry.file!r} must end in .txt or .jsonl")
        elif not file.is_file():
            found.append(f"texts.{index}.file: {file} not found (paths are relative to the suite's folder)")
        if entry.num_tokens < 2 * entry.seq_len:
            found.append(
                f"texts.{index}.num_tokens: {entry.num_tokens} is less than two rows of seq_len {entry.seq_len}"
            )
    return [LLMCompressError(f"{suite.where}: {text}") for text in found]
