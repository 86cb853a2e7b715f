"""The report as a stranger may see it: the same evidence without the paths of the machine that took it.

    report.json ──> public() ──> everything else of the card

A name that is a path keeps its last part, so a reader still learns that `tinylm` was compressed; a Hub id and
`bundled/NAME` stay whole. Paths inside messages are cut the same way. One pass over the whole report, so no section of
the card has to think of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from llmcompress.report import RunReport
from llmcompress.resources import BUNDLED

UNNAMED = "a local folder"
_ENDS_PATH = r"\s/\\:;,'\"()<>|`"
_PATH = re.compile(
    rf"(?<![\w/.:])(?:file://(?=/))?(?:[A-Za-z]:[\\/]|~[\w-]*/|\.{{1,2}}/|/)"
    rf"(?:[^{_ENDS_PATH}]+[/\\])*[^{_ENDS_PATH}]+[/\\]?"
)


def public(report: RunReport) -> RunReport:
    """A copy of the report in which every local path is cut to its last part."""
    hub_id = report.source.hub_id if report.source else None
    named = set(_path_values(report.recipe))
    if report.source and report.source.hub_id is None and not report.source.name.startswith(BUNDLED):
        named.add(report.source.name)
    paths = sorted((name for name in named if _is_path(name) and name not in (hub_id or "")), key=len, reverse=True)

    def clean(text: str) -> str:
        for path in paths:
            text = text.replace(path, last_part(path))
        return _PATH.sub(lambda match: last_part(match[0]), text)

    data = report.model_dump() | {"recipe": _public_recipe(report.recipe, hub_id)}
    return RunReport.model_validate(_each_string(data, clean))


def last_part(path: str) -> str:
    """What a path leads to, without the way there.

    >>> last_part("../models/tinylm/"), last_part("C:\\\\work\\\\m"), last_part("..")
    ('tinylm', 'm', 'a local folder')
    """
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else UNNAMED


def _is_path(value: str) -> bool:
    return bool(re.search(r"[/\\]", value)) or value in (".", "..") or value.startswith("~")


def _path_values(recipe: dict[str, Any]) -> Iterator[str]:
    """Strings of a recipe that can be local paths; a revision such as refs/pr/1 cannot."""
    found: list[str] = []
    _each_string({key: value for key, value in recipe.items() if key != "revision"}, lambda v: found.append(v) or v)
    return (value for value in found if len(value) > 2 and _is_path(value) and not value.startswith(BUNDLED))


def _public_recipe(recipe: dict[str, Any], hub_id: str | None) -> dict[str, Any]:
    """The recipe with every path cut; what looks like `org/name` is kept only where it is known to be the Hub's."""

    def clean(value: str) -> str:
        kept = value == hub_id or value.startswith(BUNDLED)
        return last_part(value) if _is_path(value) and not kept else value

    head = {"revision": recipe["revision"]} if "revision" in recipe else {}
    cleaned: dict[str, Any] = _each_string(recipe, clean)
    return {**cleaned, **head, **({"output": last_part(recipe["output"])} if "output" in recipe else {})}


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to every string in it; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_string(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each_string(one, change) for one in value)
    return value
