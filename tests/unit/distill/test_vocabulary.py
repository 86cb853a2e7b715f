"""Vocabularies: equal, equal up to padding rows, different."""

from __future__ import annotations

import pytest

from llmcompress.distill.vocabulary import shared_vocabulary
from llmcompress.errors import LLMCompressError

TOKENS = {f"t{i}": i for i in range(151665)}


def test_equal() -> None:
    assert shared_vocabulary("a", TOKENS, 151936, "b", TOKENS, 151936).note is None


@pytest.mark.parametrize("rows", [(152064, 151936), (151936, 152064)])
def test_padding_rows_are_cut_and_said(rows: tuple[int, int]) -> None:
    found = shared_vocabulary("a", TOKENS, rows[0], "b", TOKENS, rows[1])
    assert found.size == 151936
    assert found.note is not None and "128 rows" in found.note and f"{rows[0]} and {rows[1]}" in found.note


def test_different_tokenizers_are_refused_with_both_sizes() -> None:
    other = {token: i + 1 for token, i in list(TOKENS.items())[:1000]}
    with pytest.raises(LLMCompressError, match=r"151665 tokens against 1000, 151665 differ \('t0' first\)") as caught:
        shared_vocabulary("a", TOKENS, 151936, "b", other, 1024)
    assert "--keep" in (caught.value.hint or "")


def test_a_token_without_a_row() -> None:
    with pytest.raises(LLMCompressError, match="b: has 100 rows"):
        shared_vocabulary("a", TOKENS, 151936, "b", TOKENS, 100)
