"""Which values the weights of a linear may take, and how many of them share a scale.

A scheme is a grid: `affine` codes q mean scale * (q - zero_point); `nf4` codes index a 16-entry codebook that the
scale stretches (QLoRA, Dettmers et al. 2023, appendix E). Presets are data; the spelling W4A16 is the field's:
4-bit weights, 16-bit activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from llmcompress.errors import LLMCompressError, unknown

BITS = (2, 3, 4, 8)
NF4_BLOCK = 64


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """The grid of one linear.

    num_bits: width of a code. group_size: in_features that share a scale; -1 = the whole row.
    symmetric: the zero point is fixed at mid-range. codebook: None for an affine grid, or "nf4".
    double_quant: the scales themselves are stored in 8 bits (NF4 only).
    """

    num_bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    codebook: Literal["nf4"] | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.num_bits not in BITS:
            raise LLMCompressError(f"num_bits {self.num_bits}: must be one of {', '.join(map(str, BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise LLMCompressError(f"group_size {self.group_size}: must be positive, or -1 for one scale per row")
        if self.codebook == "nf4" and (self.num_bits, self.group_size, self.symmetric) != (4, NF4_BLOCK, True):
            raise LLMCompressError(
                f"NF4 has 4 bits, blocks of {NF4_BLOCK} and no zero point; got num_bits {self.num_bits}, group_size "
                f"{self.group_size}, {'symmetric' if self.symmetric else 'asymmetric'}",
                "leave --group-size and --asymmetric out, or choose an integer scheme such as W4A16",
            )
        if self.double_quant and self.codebook is None:
            raise LLMCompressError("double_quant: only NF4 stores its scales in 8 bits", "use scheme NF4 or drop it")

    @property
    def num_codes(self) -> int:
        """How many values a code can take: 2 ** num_bits."""
        return 1 << self.num_bits

    def group_width(self, in_features: int) -> int:
        """In_features per group for a row of `in_features`, with -1 resolved.

        >>> WeightScheme(group_size=-1).group_width(768)
        768
        """
        return in_features if self.group_size == -1 else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Groups in a row; the stage has refused widths that the group size does not divide."""
        return in_features // self.group_width(in_features)

    def label(self) -> str:
        """A short name for tables.

        >>> WeightScheme().label(), WeightScheme(3, -1, False).label(), PRESETS["NF4-DQ"].label()
        ('int4 g128 sym', 'int3 row asym', 'nf4 b64 dq')
        """
        if self.codebook:
            return f"{self.codebook} b{self.group_size}{' dq' if self.double_quant else ''}"
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.num_bits} {group} {'sym' if self.symmetric else 'asym'}"


PRESETS: dict[str, WeightScheme] = {
    "W2A16": WeightScheme(2, 64),
    "W3A16": WeightScheme(3, 128),
    "W4A16": WeightScheme(4, 128),
    "W8A16": WeightScheme(8, 128),
    "NF4": WeightScheme(4, NF4_BLOCK, codebook="nf4"),
    "NF4-DQ": WeightScheme(4, NF4_BLOCK, codebook="nf4", double_quant=True),
}


def preset(name: str, where: str | None = None, **changes: Any) -> WeightScheme:
    """The scheme called `name`, with fields replaced by those `changes` that are not None.

    Raises: LLMCompressError for an unknown name or a combination that does not exist.

    >>> preset("W4A16", group_size=64).label()
    'int4 g64 sym'
    """
    if name not in PRESETS:
        raise unknown("scheme", name, PRESETS, where)
    return replace(PRESETS[name], **{key: value for key, value in changes.items() if value is not None})
