"""Codes of 2, 3, 4 or 8 bits in 32-bit words, and NF4 codes in bytes: how packed weights lie in a file.

All integer layouts share one rule: the codes of a row form one stream of bits, the earliest code in the lowest bits,
and the stream is cut into words of 32. Where b divides 32 a word holds whole codes; at 3 bits a code may straddle:

    word 0                                   word 1                         word 2
    | c0 | c1 | ... | c9 | c10 (low 2 bits) || c10 (high 1) | c11 ... c21 (low 1) || c21 (high 2) | ... | c31 |

so that 32 codes of b bits always take exactly b words. This is both the GPTQ layout and the `pack-quantized` layout of
compressed-tensors; they differ only in the axis. A row whose length is no multiple of 32 ends in zero bits. Read as
bytes, lowest first, the same stream is 8 codes in b bytes, which is how it is built here: a word's lowest byte comes
first in memory on little-endian machines, the only ones supported.

bitsandbytes packs two codes a byte the other way round: the earlier code in the high half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WORD_BITS = 32
BYTE_BITS = 8
WORD_BYTES = 4


def num_words(num_codes: int, num_bits: int) -> int:
    """Words that hold `num_codes` codes of `num_bits` bits.

    >>> num_words(32, 3), num_words(33, 4)
    (3, 5)
    """
    return -(-num_codes * num_bits // WORD_BITS)


def pack_words(codes: torch.Tensor, num_bits: int, axis: int = -1) -> torch.Tensor:
    """Codes [.., n, ..] (uint8) to int32 words [.., num_words(n, num_bits), ..] along `axis`, little end first.

    >>> import torch
    >>> [hex(word) for word in pack_words(torch.arange(8, dtype=torch.uint8), 4).tolist()]
    ['0x76543210']
    """
    import torch

    _check_range(codes, num_bits)
    rows = codes.movedim(axis, -1)
    num_codes = rows.shape[-1]
    rows = torch.nn.functional.pad(rows, (0, -num_codes % WORD_BITS)).contiguous()
    lanes = rows.reshape(*rows.shape[:-1], -1, BYTE_BITS)
    stream = torch.zeros(*lanes.shape[:-1], num_bits, dtype=torch.uint8, device=codes.device)
    for lane in range(BYTE_BITS):
        byte, offset = divmod(lane * num_bits, BYTE_BITS)
        stream[..., byte] |= lanes[..., lane] << offset
        if offset + num_bits > BYTE_BITS:
            stream[..., byte + 1] |= lanes[..., lane] >> (BYTE_BITS - offset)
    words = stream.reshape(*rows.shape[:-1], -1).view(torch.int32)[..., : num_words(num_codes, num_bits)]
    return words.movedim(-1, axis).clone(memory_format=torch.contiguous_format)


def unpack_words(words: torch.Tensor, num_bits: int, num_codes: int, axis: int = -1) -> torch.Tensor:
    """The inverse of `pack_words`: int32 words to uint8 codes, `num_codes` of them along `axis`.

    >>> import torch
    >>> unpack_words(torch.tensor([0x76543210], dtype=torch.int32), 4, 8).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    import torch

    assert words.dtype == torch.int32, f"words are int32, got {words.dtype}"
    rows = words.movedim(axis, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % num_bits)).clone(memory_format=torch.contiguous_format)
    stream = rows.view(torch.uint8).reshape(*rows.shape[:-1], -1, num_bits)
    lanes = torch.empty(*stream.shape[:-1], BYTE_BITS, dtype=torch.uint8, device=words.device)
    for lane in range(BYTE_BITS):
        byte, offset = divmod(lane * num_bits, BYTE_BITS)
        lanes[..., lane] = stream[..., byte] >> offset
        if offset + num_bits > BYTE_BITS:
            lanes[..., lane] |= stream[..., byte + 1] << (BYTE_BITS - offset)
    codes = (lanes & ((1 << num_bits) - 1)).reshape(*rows.shape[:-1], -1)[..., :num_codes]
    return codes.movedim(-1, axis).contiguous()


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes (uint8, an even number of them, row-major) to bytes [n / 2]: the earlier code in the high half.

    >>> import torch
    >>> [hex(byte) for byte in pack_nibbles(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist()]
    ['0x12', '0xf0']
    """
    _check_range(codes, 4)
    flat = codes.reshape(-1)
    return (flat[0::2] << 4) | flat[1::2]


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: bytes to twice as many codes, flat.

    >>> import torch
    >>> unpack_nibbles(torch.tensor([0x12], dtype=torch.uint8)).tolist()
    [1, 2]
    """
    import torch

    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 0xF), dim=-1).reshape(-1)


def _check_range(codes: torch.Tensor, num_bits: int) -> None:
    """A code too wide would spill into its neighbours without a trace, so it must not pass."""
    import torch

    assert codes.dtype == torch.uint8, f"codes are uint8, got {codes.dtype}"
    assert codes.numel() == 0 or int(codes.max()) < 1 << num_bits, f"a code does not fit into {num_bits} bits"
