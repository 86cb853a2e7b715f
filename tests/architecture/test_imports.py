"""Imports point one way, and every engine has one door.

errors ← config, report … ← checkpoint, models, data ← compress, formats … ← evaluate, verify, card … ← pipeline ← api ← cli
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib

import pytest

from tests.architecture.sources import ROOT, sources

LAYERS = (
    {"errors"},
    {
        "__init__",
        "config",
        "console",
        "distributed",
        "files",
        "memory",
        "registry",
        "report",
        "resources",
        "seed",
        "template_worker",
        "templates",
    },
    {"scheme"},
    {"checkpoint", "data", "models", "training"},
    {"formats"},
    {"compress"},
    {"distill", "finetune"},
    {"card", "evaluate", "publish", "verify"},
    {"pipeline"},
    {"api"},
    {"cli"},
    {"__main__"},
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
ONE_DOOR = ("bitsandbytes", "greenlet", "huggingface_hub", "lm_eval", "matplotlib", "numba", "peft", "triton", "trl")


NOUNS = ("compress.scheme", "compress.weight", "compress.grid", "compress.nested_scales")
"""What compress and formats both speak of: a part of its own, `scheme`, below the two."""


def part_of(module: str) -> str:
    """The part of the package that a dotted name belongs to: llmcompress.card.build is of `card`."""
    pieces = module.split(".")
    if ".".join(pieces[1:3]) in NOUNS:
        return "scheme"
    return pieces[1] if len(pieces) > 1 else "__init__"


def edges() -> set[tuple[str, str, str]]:
    """(file, importing part, imported part) wherever one part of the package imports another.

    What is imported for type checking alone does not count: it is never run. A name that is no part, as in `from llmcompress import __version__`, is of `__init__`.
    """
    found = set()
    for source in sources():
        here = part_of(source.name)
        for name in source.imports(for_types=False):
            there = part_of(name)
            if name.split(".")[0] == "llmcompress" and here in RANK and there != here:
                found.add((source.name, here, there if there in RANK else "__init__"))
    return found


def test_every_part_has_a_place() -> None:
    parts = {part_of(source.name) for source in sources()}
    assert parts <= set(RANK), f"say in LAYERS where these belong: {sorted(parts - set(RANK))}"


def test_imports_point_one_way() -> None:
    wrong = [f"{file}: {here} imports {there}" for file, here, there in edges() if RANK[there] > RANK[here]]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_two_parts_import_each_other() -> None:
    needs: dict[str, set[str]] = {part: set() for part in RANK}
    for _, here, there in edges():
        needs[here].add(there)
    while free := {part for part, below in needs.items() if not below}:
        needs = {part: below - free for part, below in needs.items() if part not in free}
    assert not needs, f"these parts import each other in a circle: {sorted(needs)}"


@pytest.mark.parametrize("engine", ONE_DOOR)
def test_an_engine_is_imported_in_one_file(engine: str) -> None:
    files = [source.name for source in sources() if engine in {name.split(".")[0] for name in source.imports()}]
    assert len(files) <= 1, f"{engine} is imported in {', '.join(files)}"


def test_what_is_imported_is_declared() -> None:
    """Every foreign import belongs to a distribution that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {_normal(re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0]) for line in lines}
    owners = importlib.metadata.packages_distributions()
    foreign = {name.split(".")[0] for source in sources() for name in source.imports()}
    foreign -= {"llmcompress", "pydantic_core", *sys.stdlib_module_names}  # pydantic's other half
    missing = {name for name in foreign if not declared & {_normal(name), *map(_normal, owners.get(name, []))}}
    assert not missing, f"not in pyproject.toml: {sorted(missing)}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
