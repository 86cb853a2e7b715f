"""Values against a model: every problem at once, each with its place, key, rule and value."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, model_validator

from llmcompress.config.validation import MOST_SHOWN, from_yaml, validated
from llmcompress.errors import LLMCompressError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: Inner = Inner()
    rows: list[Inner] = []
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> Outer:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


def lines_of(values: object, **place: str) -> list[str]:
    with pytest.raises(LLMCompressError) as caught:
        validated(Outer, values, **place)  # type: ignore[arg-type]
    return caught.value.lines()


def test_every_problem_of_a_file_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text("name: 3\ninner:\n  dept: 2\nrows:\n  - depth: many\n")
    with pytest.raises(LLMCompressError) as caught:
        from_yaml(Outer, file)
    assert caught.value.lines() == [
        f"{file}:1: name: input should be a valid string, not 3",
        f"{file}:3: unknown key 'dept'; known: depth",
        "hint: did you mean 'depth'?",
        f"{file}:5: rows.0.depth: input should be a valid integer, unable to parse string as an integer, not 'many'",
    ]


def test_a_missing_key_says_how_it_is_given() -> None:
    assert lines_of({}) == ["name: must be given", "hint: add name: … there"]
    assert lines_of({}, key="stage")[0] == "stage.name: must be given"


def test_a_rule_over_several_values_repeats_none_of_them() -> None:
    (line,) = lines_of({"name": "n", "low": 2})
    assert line.endswith("low is above high")


def test_a_validator_that_speaks_for_itself_keeps_its_words() -> None:
    class Own(BaseModel):
        @model_validator(mode="before")
        @classmethod
        def _refuse(cls, values: object) -> object:
            raise LLMCompressError("no such thing", "take another")

    with pytest.raises(LLMCompressError, match="no such thing") as caught:
        validated(Own, {})
    assert caught.value.hint == "take another"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_whatever_is_given_is_a_model_or_lines(values: object) -> None:
    try:
        assert isinstance(validated(Outer, values), Outer)
    except LLMCompressError as error:
        assert error.lines() and all(len(line) < 3 * MOST_SHOWN + 200 for line in error.lines())
