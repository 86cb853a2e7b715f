"""`key=value` on the command line: one value of a recipe replaced, before anything is validated.

    model=org/name    quantize.scheme=W3A16    quantize.overrides.0.scheme=NF4
    quantize.method_settings.dampening_frac=0.1

Values are YAML, as in the file. What matches nothing is an error, never a new key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmcompress.config.stage import STAGES, settings_class
from llmcompress.config.yaml_lines import KeyPath, parse_yaml
from llmcompress.errors import LLMCompressError, unknown


@dataclass
class Entry:
    """A stage as it stands in a file, before validation; `path` leads to it from the root of the file."""

    name: str
    values: dict[str, Any]
    path: KeyPath


def override(
    text: str, head: dict[str, Any], fields: Sequence[str], entries: Sequence[Entry], places: dict[KeyPath, str]
) -> None:
    """Put the value of `text` where its key leads: into `head`, whose keys are `fields`, or into a stage of `entries`.

    Its place in `places` becomes the override itself, so that a bad value is said to come from there.

    Raises: LLMCompressError for text that is not key=value and for a key that nothing has.
    """
    where = f"override {text!r}"
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise LLMCompressError(f"{where}: must be key=value", "for example quantize.scheme=W3A16")
    try:
        value = parse_yaml(raw, where)
    except LLMCompressError as error:
        raise LLMCompressError(error.message, "quote what has a special meaning in YAML") from error
    first, *rest = key.split(".")
    named = {entry.name: entry for entry in entries}
    if first in fields and not rest:
        head[first], places[first,] = value, where
    elif first in named and rest:
        known = settings_class(first).model_fields
        if rest[0] not in known:
            raise unknown("setting", rest[0], known, where)
        _put(named[first].values, rest, value, where)
        places[*named[first].path, *rest[:1]] = where
    elif first in STAGES and first not in named:
        raise LLMCompressError(f"{where}: matches nothing: the recipe has no stage {first}")
    else:
        raise unknown("key", key, [*fields, *(f"{name}.SETTING" for name in named)], where)


def _put(values: Any, keys: list[str], value: Any, where: str) -> None:
    """Replace the value that `keys` lead to; mappings on the way are made where there are none."""
    *parents, last = keys
    for key in parents:
        values = _item(values, key, where) if isinstance(values, list) else values.setdefault(key, {})
        if not isinstance(values, dict | list):
            raise LLMCompressError(f"{where}: {key} has nothing below it")
    if isinstance(values, list):
        _item(values, last, where)
        values[int(last)] = value
    else:
        values[last] = value


def _item(values: list[Any], key: str, where: str) -> Any:
    if not key.isdecimal() or int(key) >= len(values):
        raise LLMCompressError(f"{where}: matches nothing: {key} is no index of a list of {len(values)}")
    return values[int(key)]
