"""YAML that remembers where every key stood, so that what is wrong with a value can be said as `file:line`.

    stages:                       ("stages",)                          recipe.yaml:4
      - quantize:                 ("stages", 0), (…, "quantize")       recipe.yaml:5
          scheme: W4A16           ("stages", 0, "quantize", "scheme")  recipe.yaml:6

PyYAML first composes a tree of nodes, each with its marks, and then constructs values from it; the marks are taken in
between. A key given twice, which YAML forbids and PyYAML lets pass, is refused.

The text may be somebody else's, and a few hundred bytes of YAML can ask for any amount of work: ten aliases of ten
aliases of …, brackets a thousand deep, an integer of a million digits. So bytes, nesting, digits, and the number of
values with every alias written out are bounded before anything is constructed. true and false are the only booleans:
`no` is Norwegian, as in YAML 1.2 and on the Hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import LLMCompressError, raise_all, shown

MAX_BYTES = 256 << 10
MAX_DEPTH = 40
MAX_VALUES = 50_000
"""With every alias written out."""
MAX_DIGITS = 40

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the root of a document to a value."""


@dataclass(frozen=True)
class Located:
    """The mapping at the root of a document, and the place of every key in it."""

    data: dict[str, Any]
    origin: str = ""
    places: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The place of `path`, or of the nearest key around it, or the document itself."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.origin


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds; every error has the place where it was met."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node, unless it is nested too deeply."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} deep",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; a date that is none and a number that is too long are marked like any other mistake."""
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(node.value)} characters, where {MAX_DIGITS} are read",
                problem_mark=node.start_mark,
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            problem = f"{shown(node.value, 40)!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))


def read_yaml(path: Path) -> Located:
    """The document in the file `path`.

    Raises: LLMCompressError for a file that cannot be read, is not YAML or is beyond the bounds, a root that is no
    mapping, a key that is no plain text, and one for each key that is given twice.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise LLMCompressError(f"{path}: {path.stat().st_size} bytes, where at most {MAX_BYTES} are read as YAML")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LLMCompressError(f"{path}: not YAML text ({shown(error, 120)})") from error
    places: dict[KeyPath, str] = {}
    data = parse_yaml(text, str(path), places=places)
    if not isinstance(data, dict):
        raise LLMCompressError(f"{path}: must be a list of `key: value` lines")
    return Located(data, str(path), places)


def parse_yaml(
    text: str, where: str, *, loader: type[Loader] = Loader, places: dict[KeyPath, str] | None = None
) -> Any:
    """The value of one YAML document; `where` is the file that it is from, or what a user typed.

    places: takes the place of every key, and keys that are given twice or are no plain text are then refused.

    Raises: LLMCompressError, with the line where there is one.
    """
    reader = None
    try:
        if len(text) > MAX_BYTES:
            raise LLMCompressError(f"{where}: {len(text)} characters, where at most {MAX_BYTES} are read as YAML")
        reader = loader(text)
        root = reader.get_single_node()
        if root is None:
            return None
        _expanded(root, where, {}, set())
        if places is not None:
            raise_all(_places(where, root, places))
        return reader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise LLMCompressError(f"{where}{line}: not YAML ({shown(error.problem, 160)})") from error
    except yaml.YAMLError as error:
        raise LLMCompressError(f"{where}: not YAML text ({shown(str(error).splitlines()[0], 120)})") from error
    finally:
        if reader is not None:
            reader.dispose()


def _expanded(node: yaml.Node, where: str, sizes: dict[int, int], around: set[int]) -> int:
    """How many values a node stands for when its aliases are written out, each node counted once (`sizes`).

    Raises: LLMCompressError when there are too many, or a node lies inside itself.
    """
    known = sizes.get(id(node))
    if known is not None:
        return known
    place = f"{where}:{node.start_mark.line + 1}"
    if id(node) in around:
        raise LLMCompressError(f"{place}: a value that holds itself")
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    around.add(id(node))
    size = 1 + sum(_expanded(child, where, sizes, around) for child in children)
    around.remove(id(node))
    if size > MAX_VALUES:
        raise LLMCompressError(f"{place}: {size} values with every alias written out, where {MAX_VALUES} are read")
    sizes[id(node)] = size
    return size


def _places(where: str, root: yaml.Node, places: dict[KeyPath, str]) -> list[LLMCompressError]:
    problems: list[LLMCompressError] = []

    def visit(node: yaml.Node, path: KeyPath) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                places[*path, index] = f"{where}:{item.start_mark.line + 1}"
                visit(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                place = f"{where}:{key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                    problems.append(LLMCompressError(f"{place}: a key must be plain text"))
                    continue
                below = (*path, key.value)
                if below in places:
                    problems.append(
                        LLMCompressError(f"{place}: {shown(key.value)}: given twice, first at {places[below]}")
                    )
                places[below] = place
                visit(value, below)

    visit(root, ())
    return problems


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
