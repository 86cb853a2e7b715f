"""Files and functions stay small, say what they give, and are named for their job."""

from __future__ import annotations

import ast

import pytest

from tests.architecture.sources import PACKAGE, Function, Source, public_functions, sources

MOST_LINES_IN_A_FILE = 450
MOST_LINES_IN_A_FUNCTION = 80
NAMES_WITHOUT_A_JOB = {"utils", "util", "helpers", "helper", "common", "misc"}

every_file = pytest.mark.parametrize("source", sources(), ids=lambda source: source.name)


@every_file
def test_file_is_short_and_named_for_its_job(source: Source) -> None:
    assert not set(source.path.relative_to(PACKAGE).with_suffix("").parts) & NAMES_WITHOUT_A_JOB
    assert len(source.text.splitlines()) <= MOST_LINES_IN_A_FILE


@every_file
def test_file_teaches(source: Source) -> None:
    assert not source.text or ast.get_docstring(source.tree), "a module starts with what it is for"


@every_file
def test_functions_are_short(source: Source) -> None:
    long = [f"{one.name}: {_lines(one)} lines" for one in source.functions() if _lines(one) > MOST_LINES_IN_A_FUNCTION]
    assert not long, "; ".join(long)


@every_file
def test_public_functions_are_documented_and_annotated(source: Source) -> None:
    wrong = []
    for function in public_functions(source.tree):
        if not ast.get_docstring(function) and not _says_it_elsewhere(function):
            wrong.append(f"{function.name}: no docstring")
        wrong += [f"{function.name}: {name} is not annotated" for name in _bare(function)]
    assert not wrong, "; ".join(wrong)


def _lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def _says_it_elsewhere(function: Function) -> bool:
    """An overload is described by the function it is of."""
    return any(isinstance(one, ast.Name) and one.id == "overload" for one in function.decorator_list)


def _bare(function: Function) -> list[str]:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    names = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
    return names if function.returns else [*names, "the result"]
