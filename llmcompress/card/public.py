"""The report as a stranger may see it: the same evidence without the paths of the machine that took it.

    report.json ──> public() ──> everything else of the card

A name that is a path keeps its last part, so a reader still learns that `tinylm` was compressed; a Hub id and
`bundled/NAME` stay whole. Paths inside messages are cut the same way. One pass over the whole report, so no section of
the card has to think of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from llmcompress.data.sources import SUFFIXES
from llmcompress.report import RunReport
from llmcompress.resources import BUNDLED

UNNAMED = "a local folder"
_ENDS_PATH = r"\s/\\:;,'\"()<>|`"
_PATH = re.compile(
    rf"(?<![\w/.:])(?:file://(?=/))?(?:[A-Za-z]:[\\/]|~[\w-]*/|\.{{1,2}}/|/)"
    rf"(?:[^{_ENDS_PATH}]+[/\\])*[^{_ENDS_PATH}]+[/\\]?"
)
_MACHINE_PATH = re.compile(
    rf"(?<![\w/.:-])(?:/(?:home|root|Users|tmp|work|mnt|data|opt|var|srv|media)/|~/|[A-Z]:\\)[^{_ENDS_PATH}][^\s'\"`)<>]*"
)


def public(report: RunReport) -> RunReport:
    """A copy of the report in which every local path is cut to its last part."""
    source = report.source
    hub = _of_the_hub(report)
    names = [*_strings(report.recipe), *([source.name] if source else [])]
    paths = sorted({name for name in names if _is_path(name, hub) and len(name) > 2}, key=len, reverse=True)
    known = re.compile("|".join(rf"(?<![\w./\\-]){re.escape(path)}(?![\w-])" for path in paths) or r"(?!)")

    def clean(text: str) -> str:
        return _PATH.sub(lambda match: last_part(match[0]), known.sub(lambda match: last_part(match[0]), text))

    data: dict[str, Any] = _each_string(report.model_dump(exclude={"recipe"}), clean)
    if source:
        data["source"]["name"] = last_part(source.name) if _is_path(source.name, hub) else source.name
    return RunReport.model_validate(data | {"recipe": _public_recipe(report.recipe, hub)})


def datasets(report: RunReport) -> list[str]:
    """The datasets of the Hub that it was trained on; a file stands in a report by its name, which has a suffix."""
    trained = [part.data.source for part in (report.finetune, report.distillation) if part]
    return sorted({source.split(" at ")[0] for source in trained if not source.endswith(SUFFIXES)})


def _of_the_hub(report: RunReport) -> frozenset[str]:
    """Names that look like paths and are the Hub's."""
    ids = [report.source.hub_id] if report.source and report.source.hub_id else []
    return frozenset([*ids, *datasets(report)])


def local_paths(text: str) -> list[str]:
    """The paths in a text that only mean something on the machine that wrote it.

    >>> local_paths("see /home/me/models/x and https://hf.co/tmp/x, or /v1/models")
    ['/home/me/models/x']
    """
    return [match[0] for match in _MACHINE_PATH.finditer(text)]


def last_part(path: str) -> str:
    """What a path leads to, without the way there.

    >>> last_part("../models/tinylm/"), last_part("C:\\\\work\\\\m"), last_part("..")
    ('tinylm', 'm', 'a local folder')
    """
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else UNNAMED


def _is_path(value: str, hub: frozenset[str]) -> bool:
    if value in hub or value.startswith(BUNDLED):
        return False
    return bool(re.search(r"[/\\]", value)) or value in (".", "..") or value.startswith("~")


def _strings(recipe: dict[str, Any]) -> list[str]:
    """Every string of a recipe that may be a path; a revision such as refs/pr/1 is none."""
    found: list[str] = []

    def note(value: str) -> str:
        found.append(value)
        return value

    _each_string({key: value for key, value in recipe.items() if key != "revision"}, note)
    return found


def _public_recipe(recipe: dict[str, Any], hub: frozenset[str]) -> dict[str, Any]:
    """The recipe with every path cut; what looks like `org/name` is kept only where it is known to be the Hub's."""

    def clean(value: str) -> str:
        return last_part(value) if _is_path(value, hub) else value

    cleaned: dict[str, Any] = _each_string(recipe, clean)
    exact = {"revision": recipe["revision"]} if "revision" in recipe else {}
    return cleaned | exact | ({"output": last_part(str(recipe["output"]))} if "output" in recipe else {})


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to every string in it; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_string(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each_string(one, change) for one in value)
    return value
