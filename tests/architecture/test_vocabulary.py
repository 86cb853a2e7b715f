"""The field's words wherever a person reads: README, guides, help texts, the card."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, sources

FORBIDDEN = (
    # what this project once said         what the field says
    "insides",  # hidden states and attention
    "makers?",  # transforms
    "learned tokens?",  # tokens that the loss is taken over
    "draws? lots",  # random seed
    "spread over",  # sharded
    "made with (?=[a-z]+ (?:text|data))",  # trained or calibrated on
    "made up by",  # generated
    "locomotives?",
    "aimed at",  # asymmetric calibration
    "licences?",  # license, in American spelling
    "quantis\\w+",
    "what is to be answered",  # completions
    "its answers",  # its quality
    "overlap gate",  # contamination
    "survival",  # retention
    "a zero point of its own",
    "likeliest",  # top-k
)
PATTERN = re.compile(rf"\b(?:{'|'.join(FORBIDDEN)})\b", flags=re.I)
TEXTS = sorted(
    path
    for pattern in ("README.md", "llmcompress/guides/**/*.md", "llmcompress/card/*.j2")
    for path in ROOT.glob(pattern)
)


def help_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Descriptions and help of options in a module: strings given to Field, option, Option and Argument."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("Field", "option", "Option", "Argument"):
                given = [*node.args, *(one.value for one in node.keywords if one.arg in ("help", "description"))]
                for one in given:
                    if isinstance(one, ast.Constant) and isinstance(one.value, str):
                        yield one.lineno, one.value


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_pages_speak_the_fields_language(path: Path) -> None:
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", path.read_text(encoding="utf-8"))  # a template's own names are not read
    lines = enumerate(text.splitlines(), 1)
    found = [f"{path.name}:{number}: {match[0]}" for number, line in lines if (match := PATTERN.search(line))]
    assert not found, "\n".join(found)


def test_help_texts_speak_the_fields_language() -> None:
    found = [
        f"{source.path.relative_to(ROOT)}:{line}: {match[0]}"
        for source in sources()
        for line, said in help_texts(source.path)
        if (match := PATTERN.search(said))
    ]
    assert not found, "\n".join(found)


def test_a_forbidden_word_is_found() -> None:
    assert PATTERN.search("the insides of the student") and PATTERN.search("Its Licence")
    assert not PATTERN.search("quantized, licensed, remaking")
