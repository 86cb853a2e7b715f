"""A closed set of named things, filled by the folder they live in.

Adding a method or a format costs one file: the registry imports every module of its folder once and takes what each
declares. Two of one name are refused, naming both places; a miss says what is known and what was probably meant.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Generic, TypeVar

from llmcompress.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to entries, discovered in one package on first use.

    Every module of `package` that binds `ENTRY`, an object with a `name`, adds an entry; others are what entries share.
    A module that fails to import fails here, loudly: a broken entry is never merely absent.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] | None = None

    def _load(self) -> dict[str, T]:
        if self._entries is None:
            entries: dict[str, T] = {}
            origin: dict[str, str] = {}
            for info in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
                module = importlib.import_module(f"{self._package}.{info.name}")
                if not hasattr(module, "ENTRY"):
                    continue
                entry = module.ENTRY
                if entry.name in entries:
                    raise RuntimeError(f"{self.kind} {entry.name!r} is in {origin[entry.name]} and in {info.name}")
                entries[entry.name], origin[entry.name] = entry, info.name
            self._entries = entries
        return self._entries

    def get(self, name: str, where: str | None = None) -> T:
        """The entry called `name`.

        Raises: LLMCompressError with the known names and the nearest one.
        """
        entries = self._load()
        if name not in entries:
            raise unknown(self.kind, name, entries, where)
        return entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._load())

    def __iter__(self) -> Iterator[T]:
        return iter(self._load()[name] for name in self.names())
