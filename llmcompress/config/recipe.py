"""Recipe: a whole run as one frozen value. Same digest, same run.

    model: org/name            a folder, a Hub id, or bundled/tiny       key=value on the command line replaces a value:
    output: out/name                                                       model=other/name   seed=1
    seed: 0                                                                quantize.scheme=W3A16
    stages:                    each at most once                           quantize.method_settings.dampening_frac=0.1
      - quantize: {scheme: W4A16, method: gptq, calibration: my.txt}       stages that make a checkpoint: in any order;
      - verify: {}                                                         then verify, evaluate, card
      - evaluate: {suite: tiny}
      - card: {}

Every problem of a file is found in one pass and said with its line. The verbs of the command line build one-stage
recipes with `Recipe.of`, so there is one way to run anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from llmcompress import resources
from llmcompress.config.overrides import Entry, override
from llmcompress.config.stage import STAGES, Step, rank, stage, stages
from llmcompress.config.validation import at, validated
from llmcompress.config.yaml_lines import Located, read_yaml
from llmcompress.errors import LLMCompressError, collected, raise_all, unknown


class Recipe(BaseModel):
    """The whole run; see the module's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="folder, Hub id or bundled/NAME")
    revision: str | None = Field(None, description="of a Hub id: commit, tag or branch")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")
    allow_pickle: bool = Field(False, description="read weights that can run code when they are read")
    output: str = Field(min_length=1, description="folder of the result")
    seed: int = Field(0, ge=0)
    stages: tuple[InstanceOf[Step], ...]

    @classmethod
    def of(cls, data: Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
        """The recipe that `data` describes, in the shape of a recipe file, with `key=value` overrides applied.

        Raises: LLMCompressError, all problems together.
        """
        return _build(Located(dict(data)), overrides)

    def stage(self, name: str) -> Step | None:
        """The step called `name`, or None."""
        return next((step for step in self.stages if step.name == name), None)

    def transforms(self) -> tuple[Step, ...]:
        """The steps that make a checkpoint, in order."""
        return tuple(step for step in self.stages if step.transforms)

    def checks(self) -> tuple[Step, ...]:
        """The steps that report on what was made, in order."""
        return tuple(step for step in self.stages if not step.transforms)

    def dump(self) -> dict[str, Any]:
        """Every value, defaults included, as plain data in the shape of a recipe file."""
        head = self.model_dump(mode="json", exclude={"stages"})
        return head | {"stages": [{step.name: step.settings.model_dump(mode="json")} for step in self.stages]}

    def digest(self) -> str:
        """sha256 over every value but the output folder: the same work has the same digest wherever it is put."""
        values = {key: value for key, value in self.dump().items() if key != "output"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def as_yaml(data: Mapping[str, Any]) -> str:
    """The text of a recipe file with the given content."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=120)


def shipped_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in resources.recipes().glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The recipe file at the path `name`, or the shipped recipe of that name.

    Raises: LLMCompressError when there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if name in shipped_names():
        return resources.recipes() / f"{name}.yaml"
    if "/" in name or name.endswith((".yaml", ".yml")):
        raise LLMCompressError(f"{name}: no such recipe file", f"shipped recipes: {', '.join(shipped_names())}")
    raise unknown("recipe", name, shipped_names())


def load(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, or the shipped one called `name`, with `key=value` overrides applied.

    Consent to run code is given by an override (the command line's flag is one), never by the file.

    Raises: LLMCompressError, one for each problem of the file and of the overrides, all together.
    """
    return _build(read_yaml(recipe_file(str(name))), overrides, from_file=True)


CONSENT = {
    "trust_remote_code": "run code that comes with the checkpoint",
    "allow_pickle": "read weights that can run code when they are read",
}
"""Keys by which a user consents to something that could run foreign code -> what that is."""


def consent_missing(data: Mapping[str, Any], given: Mapping[str, bool], where: str) -> list[LLMCompressError]:
    """One error for each consent that `data` (read from a file or a report) asks for and the user has not given."""
    return [
        LLMCompressError(
            f"{where}: {key} is true there, but only you can allow to {meaning}",
            f"pass --{key.replace('_', '-')} ({key}=True in Python) if you trust where it comes from",
        )
        for key, meaning in CONSENT.items()
        if data.get(key) and not given.get(key)
    ]


HEAD = tuple(name for name in Recipe.model_fields if name != "stages")
"""The keys of a recipe beside its stages."""


def _build(source: Located, overrides: Iterable[str], from_file: bool = False) -> Recipe:
    head = {key: value for key, value in source.data.items() if key != "stages"}
    asked = {key: value for key, value in head.items() if key in CONSENT}
    head |= dict.fromkeys(asked, False) if from_file else {}
    entries, problems = _entries(source)
    for text in overrides:
        with collected(problems):
            override(text, head, HEAD, entries, source.places)
    if from_file:
        problems += consent_missing(asked, {key: bool(head.get(key)) for key in CONSENT}, source.origin)
    steps: list[Step] = []
    for entry in entries:
        with collected(problems):
            steps.append(_step(entry, source))
    with collected(problems):
        recipe = validated(Recipe, head | {"stages": tuple(steps)}, source)
    raise_all(problems)
    return recipe


def _entries(source: Located) -> tuple[list[Entry], list[LLMCompressError]]:
    listed = source.data.get("stages")
    shape = "a list such as `- verify: {}`"
    if not isinstance(listed, list) or not listed:
        return [], [at(source.where(("stages",)), f"stages: must be {shape}")]
    entries: list[Entry] = []
    problems: list[LLMCompressError] = []
    for index, item in enumerate(listed):
        where = source.where(("stages", index))
        name, values = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (None, None)
        if not isinstance(name, str) or not isinstance(values, dict | None):
            problems.append(at(where, f"stages.{index}: a stage is one name with its settings, {shape}"))
        elif name not in STAGES:
            problems.append(unknown("stage", name, STAGES, where))
        else:
            entries.append(Entry(name, dict(values or {}), ("stages", index, name)))
    return entries, problems + _order(entries, source)


def _order(entries: list[Entry], source: Located) -> list[LLMCompressError]:
    """Transforms come first, in any order, then checks in their own; an adapter goes only where one is taken."""
    names = {kind: ", ".join(known.name for known in stages(kind)) for kind in ("transform", "check")}
    rule = f"{names['transform']} run in the order given, then {names['check']}, each at most once"
    problems = []
    for index, (before, entry) in enumerate(pairwise(entries), 1):
        earlier = [earlier.name for earlier in entries[:index]]
        last = next((stage(name) for name in reversed(earlier) if stage(name).kind == "transform"), None)
        if entry.name in earlier or rank(entry.name) < rank(before.name):
            problems.append(at(source.where(entry.path), f"stage {entry.name} after {before.name}: {rule}"))
        elif last is not None and last.makes_adapter and not stage(entry.name).takes_adapter:
            text = f"stage {entry.name} after {last.name}, which makes an adapter and no checkpoint of its own"
            problems.append(at(source.where(entry.path), text, "put `- merge: {}` between them"))
    return problems


def _step(entry: Entry, source: Located) -> Step:
    kind = stage(entry.name)
    settings = validated(kind.Settings, entry.values, source, entry.path, entry.name)
    problems = []
    for problem in kind.problems(settings):
        key = problem.message.partition(":")[0]
        problems.append(at(source.where((*entry.path, key)), f"{entry.name}.{problem.message}", problem.hint))
    raise_all(problems)
    return Step(kind, settings)
