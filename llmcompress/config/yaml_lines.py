"""YAML that remembers where every key stood, so that what is wrong with a value can be said as `file:line`.

    stages:                       ("stages",)                          recipe.yaml:4
      - quantize:                 ("stages", 0), (…, "quantize")       recipe.yaml:5
          scheme: W4A16           ("stages", 0, "quantize", "scheme")  recipe.yaml:6

PyYAML first composes a tree of nodes, each with its marks, and then constructs values from it; the marks are taken in
between. A key given twice, which YAML forbids and PyYAML lets pass, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import LLMCompressError, raise_all

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


def read_yaml(path: Path) -> Located:
    """The document in the file `path`.

    Raises: LLMCompressError for a file that cannot be read or is not YAML, a root that is no mapping, a key that is no
    plain text, and one for each key that is given twice.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        places, problems = _places(path, root)
        raise_all(problems)
        data = loader.construct_document(root) if root is not None else None
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise LLMCompressError(f"{path}{line}: not YAML ({error.problem})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise LLMCompressError(f"{path}: not YAML text ({str(error).splitlines()[0]})") from error
    if not isinstance(data, dict):
        raise LLMCompressError(f"{path}: must be a list of `key: value` lines")
    return Located(data, str(path), places)


def _places(file: Path, root: yaml.Node | None) -> tuple[dict[KeyPath, str], list[LLMCompressError]]:
    places: dict[KeyPath, str] = {}
    problems: list[LLMCompressError] = []

    def visit(node: yaml.Node, path: KeyPath, around: tuple[int, ...]) -> None:
        if id(node) in around:
            problems.append(LLMCompressError(f"{places[path]}: a value that holds itself"))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                places[*path, index] = f"{file}:{item.start_mark.line + 1}"
                visit(item, (*path, index), (*around, id(node)))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                place = f"{file}:{key.start_mark.line + 1}"
                if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                    problems.append(LLMCompressError(f"{place}: a key must be plain text"))
                    continue
                below = (*path, key.value)
                if below in places:
                    problems.append(LLMCompressError(f"{place}: {key.value}: given twice, first at {places[below]}"))
                places[below] = place
                visit(value, below, (*around, id(node)))

    if root is not None:
        visit(root, (), ())
    return places, problems


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
