"""Layer maps: published ones, and every way to be out of range."""

from __future__ import annotations

import pytest

from llmcompress.distill.layer_map import evenly, layer_map, parse
from llmcompress.errors import LLMCompressError


def test_uniform_is_tinyberts() -> None:
    """TinyBERT-4 from BERT-base: g(m) = 3 m over layers 1..12."""
    assert layer_map("uniform", 4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))
    assert layer_map("uniform", 6, 12)[-1] == (5, 11)
    assert layer_map("uniform", 5, 5) == tuple((i, i) for i in range(5))


def test_last() -> None:
    assert layer_map("last", 3, 12) == ((0, 9), (1, 10), (2, 11))


@pytest.mark.parametrize("asked", ["0:1,x", "1", "0;1", "", "-1:2"])
def test_nonsense_is_refused(asked: str) -> None:
    with pytest.raises(LLMCompressError, match="layer_map"):
        parse(asked)


def test_every_pair_out_of_range_is_said() -> None:
    with pytest.raises(LLMCompressError) as caught:
        layer_map("0:6,3:1,1:1,1:2", 3, 6)
    text = str(caught.value)
    assert "teacher has layers 0 to 5, 6 is none" in text
    assert "student has layers 0 to 2, 3 is none" in text
    assert "layer 1 of the student is mapped twice" in text


def test_more_layers_than_the_teacher() -> None:
    with pytest.raises(LLMCompressError, match="the student has 7 layers, the teacher 6"):
        layer_map("uniform", 7, 6)


def test_evenly_is_increasing_for_all_sizes() -> None:
    for total in range(1, 20):
        for kept in range(1, total + 1):
            picked = evenly(kept, total)
            assert len(set(picked)) == kept and list(picked) == sorted(picked) and picked[-1] < total
