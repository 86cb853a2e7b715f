"""YAML of anybody's: bounded, and every problem with its line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.config.yaml_lines import parse_yaml, read_yaml
from llmcompress.errors import LLMCompressError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: " + "9" * 5000, ":2: not YAML (a number of 5000 characters, where 40 are read)"),
        ("a: 1\nb: " + "1:" * 3000 + "1", ":2: not YAML (a number of 6001 characters"),
        ("a:\n  - " + "[" * 2000, ":2: not YAML (nested more than 40 deep)"),
        ("a: " + "{b: " * 500, ":1: not YAML (nested more than 40 deep)"),
        (BOMB, ":5: 111111 values with every alias written out, where 50000 are read"),
        ("a: &a\n  b: *a\n", ":1: a value that holds itself"),
        ("<<: &a\n  <<: *a\n", ":1: a value that holds itself"),
        ("a: 1\nd: 2001-99-99", ":2: not YAML ('2001-99-99' is no timestamp)"),
        ("a: !!int many", ":1: not YAML ('many' is no int)"),
        ("a: !!python/object/apply:os.system [x]", ":1: not YAML (could not determine a constructor"),
        ("a: 1\na: 2", ":2: a: given twice"),
        ("? [a]\n: 1", ":1: a key must be plain text"),
        ("a: [\x00]", "not YAML text"),
        ("- 1", "must be a list of `key: value` lines"),
        ("", "must be a list of `key: value` lines"),
        ("a: " + "x" * 300_000, "where at most 262144 are read as YAML"),
    ],
)
def test_a_file_beyond_the_bounds_is_one_line(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    began = time.monotonic()
    with pytest.raises(LLMCompressError) as caught:
        read_yaml(path)
    assert time.monotonic() - began < 5
    assert caught.value.message.startswith(f"{path}{expected.split(' ')[0]}" if expected[0] == ":" else str(path))
    assert expected in caught.value.message and "\n" not in caught.value.message


def test_a_byte_order_mark_and_aliases_are_fine(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("\ufeffa: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}\n".encode())
    assert read_yaml(tmp_path / "r.yaml").data == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


def test_no_is_norwegian() -> None:
    assert parse_yaml("[no, yes, on, off, n, true, False]", "x") == ["no", "yes", "on", "off", "n", True, False]


text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)


@given(plain)
def test_what_pyyaml_writes_is_read_back(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True), "x") == value
