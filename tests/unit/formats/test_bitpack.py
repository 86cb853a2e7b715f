"""Bit packing against the definition of the stream, written bit by bit, and against compressed-tensors' own packing."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from llmcompress.formats.bitpack import num_words, pack_nibbles, pack_words, unpack_nibbles, unpack_words

BITS = (2, 3, 4, 8)


def codes_of(num_bits: int, *shape: int) -> torch.Tensor:
    """Random codes, uint8."""
    return torch.randint(0, 1 << num_bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("num_codes", [1, 10, 11, 21, 31, 32, 33, 64, 96, 100])
def test_words_are_the_bit_stream(num_bits: int, num_codes: int) -> None:
    codes = codes_of(num_bits, num_codes)
    stream = sum(code << (index * num_bits) for index, code in enumerate(codes.tolist()))
    words = pack_words(codes, num_bits)
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [
        (stream >> (32 * index)) & 0xFFFFFFFF for index in range(num_words(num_codes, num_bits))
    ]
    assert torch.equal(unpack_words(words, num_bits, num_codes), codes)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 96), (9, 33), (32, 9), (1, 1)])
def test_words_are_those_of_compressed_tensors(num_bits: int, axis: Literal[0, 1], shape: tuple[int, int]) -> None:
    codes = codes_of(num_bits, *shape)
    signed = (codes.to(torch.int16) - (1 << (num_bits - 1))).to(torch.int8)
    theirs = pack_to_int32(signed, num_bits, packed_dim=axis)
    assert torch.equal(pack_words(codes, num_bits, axis), theirs)
    assert torch.equal(unpack_words(theirs, num_bits, shape[axis], axis), codes)
    back = unpack_from_int32(pack_words(codes, num_bits, axis), num_bits, torch.Size(shape), packed_dim=axis)
    assert torch.equal(back, signed)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_any_axis_round_trips(num_bits: int, axis: int) -> None:
    codes = codes_of(num_bits, 6, 40, 33)
    before = codes.clone()
    words = pack_words(codes, num_bits, axis)
    assert words.shape[axis] == num_words(codes.shape[axis], num_bits)
    assert torch.equal(unpack_words(words, num_bits, codes.shape[axis], axis), codes)
    assert torch.equal(codes, before)


def test_the_earlier_nibble_is_the_high_one() -> None:
    codes = codes_of(4, 6, 64)
    packed = pack_nibbles(codes)
    flat = codes.flatten().tolist()
    assert packed.tolist() == [16 * first + second for first, second in zip(flat[::2], flat[1::2], strict=True)]
    assert torch.equal(unpack_nibbles(packed).reshape(6, 64), codes)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_a_code_too_wide_does_not_pass(num_bits: int) -> None:
    with pytest.raises(AssertionError, match="does not fit"):
        pack_words(torch.tensor([1 << num_bits], dtype=torch.uint8), num_bits)
