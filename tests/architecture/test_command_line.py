"""The command line starts fast and is what README and guides say it is."""

from __future__ import annotations

import ast
import importlib
import os
import re
import resource
import shlex
import subprocess
import sys
from functools import cache

import click
import pytest

from llmcompress.cli.main import app
from tests.architecture.sources import ROOT

HELP_LIMIT_S = 0.5
START = "import sys; from llmcompress.cli.main import main; main()"
HEAVY = ("torch", "transformers", "lm_eval", "matplotlib", "bitsandbytes", "numba", "datasets", "peft", "pandas")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python without colour on a wide terminal; `arguments` become sys.argv[1:]."""
    environment = os.environ | {"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@cache
def help_of(*command: str) -> str:
    """What `llmcompress COMMAND --help` prints."""
    done = run(START, *command, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_in(pattern: str, text: str) -> bool:
    """Whether some line of `text` matches."""
    return re.search(pattern, text, flags=re.M) is not None


def documents() -> str:
    """The text of the README and of all guides."""
    paths = [ROOT / "README.md", *sorted((ROOT / "llmcompress" / "guides").glob("*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def documented_commands() -> list[str]:
    """Every llmcompress command of the documents' shell blocks, once; a backslash continues the line."""
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", documents(), flags=re.S)
    lines = [line.strip().removeprefix("$ ") for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("llmcompress ")))


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import atexit, sys
from llmcompress.cli.main import main
atexit.register(lambda: print("loaded:", [name for name in {HEAVY!r} if name in sys.modules]))
main()
"""
    done = run(code, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "loaded: []"


VERBS = [(), *((name,) for name in app().list_commands(click.Context(app()))), ("recipes", "ls"), ("recipes", "show")]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_is_there_at_once(verb: tuple[str, ...]) -> None:
    times = []  # of the processor: what a quiet machine takes, also on one that is not
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(START, *verb, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and done.stdout.startswith("Usage: llmcompress")
        if times[-1] < HELP_LIMIT_S:
            return
    raise AssertionError(f"{' '.join(verb) or 'llmcompress'} --help takes {min(times):.2f} s")


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_has_an_example(verb: tuple[str, ...]) -> None:
    if verb not in ((), ("recipes",), ("recipes", "ls")):
        assert f"Example:\n  llmcompress {' '.join(verb)}" in help_of(*verb) or verb == ("completion",)
    assert "-h, --help" in help_of(*verb)


def test_documents_show_commands() -> None:
    assert len(documented_commands()) >= 5


@pytest.mark.parametrize("line", documented_commands())
def test_documented_command_exists(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert is_in(rf"^\W*{words[0]}\s", help_of()), f"no command {words[0]!r}"
    verb = tuple(words[:2]) if words[0] == "recipes" and len(words) > 1 else (words[0],)
    text = help_of(*verb)
    for word in words[len(verb) :]:
        if word.startswith("-"):
            assert is_in(rf"(^|[\s,|]){re.escape(word.split('=')[0])}\b", text), f"{verb} has no {word}"


def documented_python() -> list[str]:
    """The documents' Python blocks."""
    return re.findall(r"```python\n(.*?)```", documents(), flags=re.S)


@pytest.mark.parametrize("block", documented_python(), ids=lambda block: block.splitlines()[0])
def test_documented_python_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lc":
            assert hasattr(importlib.import_module("llmcompress"), node.attr), f"llmcompress has no {node.attr}"
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
