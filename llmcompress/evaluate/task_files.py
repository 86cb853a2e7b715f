"""Task YAMLs that came with a suite: read as data, and asked what they would run.

lm-eval's tasks are programs as much as data. A YAML names Python by `!function`, `class:` and `custom_dataset:`, a
metric that lm-eval does not know is fetched and executed, and so is what a pickle holds. lm-eval's own tasks are code
that was installed; one beside a suite was downloaded with it, so each of these needs consent. A template is not in the
list: it runs in a sandbox (llmcompress/templates.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.config.yaml_lines import MAX_BYTES, Loader, parse_yaml
from llmcompress.errors import LLMCompressError, collected, shown

FILE_READERS = ("json", "csv", "parquet", "arrow", "text")
"""The readers of datasets that take a file for data; its `pandas` and `webdataset` unpickle."""
DATA_KEYS = (
    "data_files",
    "data_dir",
    "field",
    "split",
    "encoding",
    "sep",
    "delimiter",
    "column_names",
)
MAX_FILES, MAX_INCLUDES = 2000, 8
ENDING = ".yaml"


class FunctionName(str):
    """What stands behind `!function`."""


class _TaskLoader(Loader):
    """YAML in which `!function` is the name of a function, and no more."""


_TaskLoader.add_constructor("!function", lambda loader, node: FunctionName(loader.construct_scalar(node)))  # type: ignore


@dataclass(frozen=True)
class TaskFile:
    """One task: the YAML, and its values with those of the files that it includes."""

    path: Path
    config: dict[str, Any]


@dataclass
class TaskFiles:
    """The tasks below some folders by name; `problems` are of YAMLs that cannot be read."""

    tasks: dict[str, TaskFile] = field(default_factory=dict)
    problems: list[LLMCompressError] = field(default_factory=list)

    @classmethod
    def read(cls, folders: Sequence[Path]) -> TaskFiles:
        """Every task below `folders`; one of the same name in a later file takes the place of an earlier one.

        Raises: LLMCompressError where there are thousands of YAMLs, which is no folder of a suite.
        """
        found = cls()
        for folder in folders:
            for path in _yaml_files(folder):
                with collected(found.problems):
                    config = _with_includes(path, ())
                    if isinstance(config.get("task"), str):
                        values = {key: value for key, value in config.items() if key not in ("group", "tag")}
                        found.tasks[config["task"]] = TaskFile(path, values)
        return found


def _yaml_files(folder: Path) -> list[Path]:
    paths: list[Path] = []
    for number, (parent, folders, names) in enumerate(os.walk(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        paths += [Path(parent, name) for name in sorted(names) if name.endswith(ENDING)]
        if len(paths) > MAX_FILES or number > MAX_FILES:
            raise LLMCompressError(
                f"{folder}: more than {MAX_FILES} folders or YAML files lie beside the suite",
                "put the suite and its tasks into a folder of their own",
            )
    return paths


def _with_includes(path: Path, around: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a YAML over those that it includes.

    Raises: LLMCompressError for a file that is not there or not YAML, and for one that includes itself.
    """
    path = path.resolve()
    if path in around or len(around) > MAX_INCLUDES:
        raise LLMCompressError(f"{around[0]}: includes {path.name} in a circle, or more than {MAX_INCLUDES} deep")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LLMCompressError(f"{path}: {path.stat().st_size} bytes, where at most {MAX_BYTES} are read as YAML")
        config = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path), loader=_TaskLoader)
    except (OSError, ValueError) as error:
        raise LLMCompressError(f"{path}: cannot be read ({shown(error, 120)})") from error
    if not isinstance(config, dict):
        return {}
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _with_includes(path.parent / str(name), (*around, path))
    return merged | config


def code_problems(task: TaskFile, known_metrics: set[str], known_aggregations: set[str]) -> list[LLMCompressError]:
    """What a task would run beside lm-eval's own code, metrics and aggregations: one problem each."""
    config, reasons = task.config, [f"{key}: !function {shown(name)}" for key, name in _functions(task.config)]
    for key in ("class", "custom_dataset", "use_prompt", "unsafe_code"):
        if config.get(key) and not isinstance(config[key], FunctionName):
            reasons.append(f"{key}: {shown(config[key])}")
    metrics = config.get("metric_list") or []
    for metric in metrics if isinstance(metrics, list) else []:
        if not isinstance(metric, dict) or isinstance(metric.get("metric"), FunctionName):
            continue
        name, aggregation = metric.get("metric"), metric.get("aggregation", "mean")
        if str(name) not in known_metrics or metric.get("hf_evaluate") or str(aggregation) not in known_aggregations:
            reasons.append(f"metric_list: {shown(name)}, which is not one of lm-eval's metrics")
    reader = config.get("dataset_path")
    if reader in ("pandas", "webdataset") or (isinstance(reader, str) and Path(reader).exists()):
        reasons.append(f"dataset_path: {shown(reader)}, which may hold pickles")
    keys = config.get("dataset_kwargs") or {}
    unknown = sorted(str(key) for key in keys if key not in DATA_KEYS) if isinstance(keys, dict) else ["no mapping"]
    reasons += [f"dataset_kwargs: {shown(key)}, which is not one of {', '.join(DATA_KEYS)}" for key in unknown]
    return [
        LLMCompressError(
            f"{task.path}: would run code that came with the suite ({reason})", "read it, then pass --trust-remote-code"
        )
        for reason in reasons
    ]


def _functions(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, name) of every `!function` in a value."""
    if isinstance(value, FunctionName):
        yield key, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _functions(item, f"{key}.{name}" if key else str(name))
