"""Values against a pydantic model, every problem as one line of ours: place, key, rule, value, and what to do.

recipe.yaml:6: quantize.group_size: input should be a valid integer, not 'many'
suite.yaml:3: unknown key 'task'; known: tasks, texts, …
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from llmcompress.config.yaml_lines import KeyPath, Located, read_yaml
from llmcompress.errors import LLMCompressError, raise_all, unknown

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)
MOST_SHOWN = 200
"""Characters of a value that an error repeats."""


def from_yaml(model: type[M], path: Path) -> tuple[M, Located]:
    """The YAML file `path` as a `model`, and where its keys stood, for checks that are the caller's own.

    Raises: LLMCompressError for a file that is not YAML, and one with its line for each value that breaks a rule.
    """
    source = read_yaml(path)
    return validated(model, source.data, source), source


def validated(model: type[M], values: Any, source: Located | None = None, path: KeyPath = (), key: str = "") -> M:
    """`values` as a `model`.

    source: where the values stood, `path` leads to them from its root. key: what the names of keys begin with.

    Raises: LLMCompressError, one for each problem, all together.
    """
    source = source or Located({})
    try:
        return model.model_validate(values)
    except LLMCompressError as error:  # a validator that speaks for itself
        raise at(source.where(path), error.message, error.hint) from error
    except ValidationError as error:
        details = error.errors(include_url=False)
    raise_all([_problem(model, detail, source, path, key) for detail in details])
    raise AssertionError("a validation error without a problem")


def at(where: str, text: str, hint: str | None = None) -> LLMCompressError:
    """An error behind the place it was seen at, where there is one."""
    return LLMCompressError(f"{where}: {text}" if where else text, hint)


def _problem(
    model: type[BaseModel], detail: ErrorDetails, source: Located, prefix: KeyPath, key: str
) -> LLMCompressError:
    path = detail["loc"]
    where = source.where((*prefix, *path))
    names = [*([key] if key else []), *map(str, path)]
    name = ".".join(names) or "it"
    if detail["type"] == "extra_forbidden":
        return unknown("key", str(path[-1]), _keys(model, path[:-1]), where or ".".join(names[:-1]) or None)
    if detail["type"] == "missing":
        return at(where, f"{name}: must be given", f"add {name.rpartition('.')[2]}: … there")
    rule = detail["msg"].removeprefix("Value error, ")
    if isinstance(detail["input"], dict) and detail["type"] == "value_error":
        return at(where, f"{name}: {rule}")  # of several values together: what they are is in the rule
    value = repr(detail["input"])
    shown = value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}…"
    return at(where, f"{name}: {rule[0].lower() + rule[1:]}, not {shown}")


def _keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Keys that the values at `path` inside `model` may have."""
    for key in path:
        if isinstance(key, str) and key in model.model_fields:
            annotation = model.model_fields[key].annotation
            inner = [kind for outer in (annotation, *get_args(annotation)) for kind in (outer, *get_args(outer))]
            kinds = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
            model = kinds[0] if kinds else model
    return list(model.model_fields)
