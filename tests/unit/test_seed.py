from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.seed import derive

names = st.lists(st.text(max_size=6), max_size=3)


@given(st.integers(), names)
def test_a_seed_is_a_fixed_number_that_every_generator_takes(seed: int, parts: list[str]) -> None:
    derived = derive(seed, *parts)
    assert 0 <= derived < 2**32
    assert derived == derive(seed, *parts)


@given(st.integers(0, 99), names, st.integers(0, 99), names)
def test_other_arguments_give_another_seed(one: int, a: list[str], two: int, b: list[str]) -> None:
    assert (derive(one, *a) == derive(two, *b)) == ((one, a) == (two, b))


def test_no_global_state_is_touched() -> None:
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # type: ignore[index]
    derive(1, "a")
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
