"""The package as the architecture tests see it: files, syntax trees, and who imports whom. Nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmcompress"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file of the package: dotted name, path, text and syntax tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def imports(self, for_types: bool = True) -> list[str]:
        """Dotted names imported anywhere in the file: in functions, and `for_types` alone too.

        `from llmcompress.card import build` counts as `llmcompress.card.build`, module or not.
        """
        found: list[str] = []
        types_alone = {
            id(node)
            for block in ast.walk(self.tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(self.tree):
            if id(node) in types_alone and not for_types:
                continue
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{self.path}:{node.lineno}: a relative import"
                found += [f"{node.module}.{alias.name}" for alias in node.names]
        return found

    def functions(self) -> Iterator[Function]:
        """Every function and method, nested ones included."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file below llmcompress/, sorted."""
    return tuple(_read(path) for path in sorted(PACKAGE.rglob("*.py")))


def _read(path: Path) -> Source:
    parts = path.relative_to(ROOT).with_suffix("").parts
    text = path.read_text(encoding="utf-8")
    return Source(".".join(part for part in parts if part != "__init__"), path, text, ast.parse(text))


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods that a caller may name: nothing below an underscore, nothing inside a function."""
    waiting: list[ast.Module | ast.ClassDef] = [tree]
    while waiting:
        for node in waiting.pop().body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                waiting.append(node)
            elif isinstance(node, Function) and not node.name.startswith("_"):
                yield node
