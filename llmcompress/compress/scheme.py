"""What a linear becomes: which values its weights and inputs may take, which weights are zero, which rank it keeps.

    Scheme(weights      WeightGrid: an affine integer grid, or a codebook's values        W4A16, NF4
           activations  ActivationGrid: the inputs rounded too, per token or per tensor   W8A8
           sparsity     0.5: half of the weights are zero; "2:4": two of every four
           rank)        the weight is a product of two factors that thin

An affine code q means scale * (q - zero_point); a codebook's code means scale * values[q]. Presets and codebooks are
data: a grid more is an entry in `CODEBOOKS` and one in `PRESETS`. The spelling W4A16 is the field's: 4-bit weights,
16-bit activations. Free of torch, so that recipes, plans and `--help` load at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmcompress.errors import LLMCompressError, unknown

BITS = (2, 3, 4, 8)
EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<number>\d+)\.\w+")
"""Path of a linear of one expert of a mixture."""
N_OF_M = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, slots=True)
class Codebook:
    """Values that codes index, ascending; a group's scale stretches them. group_size: in_features per scale, fixed."""

    values: tuple[float, ...]
    group_size: int

    @property
    def num_bits(self) -> int:
        """Width of a code."""
        return (len(self.values) - 1).bit_length()


CODEBOOKS: dict[str, Codebook] = {
    # Quantiles of a standard normal, scaled to [-1, 1] (QLoRA, Dettmers et al. 2023, appendix E), as in bitsandbytes.
    "nf4": Codebook(
        (
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ),
        group_size=64,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightGrid:
    """The values that the weights of one linear may take.

    num_bits: width of a code. group_size: in_features that share a scale; -1 = the whole row.
    symmetric: the zero point is fixed at mid-range. codebook: None for an affine grid, or a name in `CODEBOOKS`.
    double_quant: the scales themselves are stored in 8 bits (codebooks only).
    """

    num_bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    codebook: str | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.num_bits not in BITS:
            raise LLMCompressError(f"num_bits {self.num_bits}: must be one of {', '.join(map(str, BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise LLMCompressError(f"group_size {self.group_size}: must be positive, or -1 for one scale per row")
        if self.codebook is None:
            if self.double_quant:
                raise LLMCompressError(
                    "double_quant: only NF4 stores its scales in 8 bits", "use scheme NF4 or drop it"
                )
            return
        if self.codebook not in CODEBOOKS:
            raise unknown("codebook", self.codebook, CODEBOOKS)
        book = CODEBOOKS[self.codebook]
        if (self.num_bits, self.group_size, self.symmetric) != (book.num_bits, book.group_size, True):
            raise LLMCompressError(
                f"{self.codebook.upper()} has {book.num_bits} bits, blocks of {book.group_size} and no zero point; got "
                f"num_bits {self.num_bits}, group_size {self.group_size}, "
                f"{'symmetric' if self.symmetric else 'asymmetric'}",
                "leave --group-size and --asymmetric out, or choose an integer scheme such as W4A16",
            )

    @property
    def num_codes(self) -> int:
        """How many values a code can take: 2 ** num_bits."""
        return 1 << self.num_bits

    @property
    def values(self) -> tuple[float, ...] | None:
        """The codebook's values, or None for an affine grid."""
        return None if self.codebook is None else CODEBOOKS[self.codebook].values

    def group_width(self, in_features: int) -> int:
        """In_features per group for a row of `in_features`, with -1 resolved.

        >>> WeightGrid(group_size=-1).group_width(768)
        768
        """
        return in_features if self.group_size == -1 else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Groups in a row; the stage has refused widths that the group size does not divide."""
        return in_features // self.group_width(in_features)

    def label(self) -> str:
        """A short name for tables.

        >>> WeightGrid().label(), WeightGrid(3, -1, False).label(), PRESETS["NF4-DQ"].label()
        ('int4 g128 sym', 'int3 row asym', 'nf4 b64 dq')
        """
        if self.codebook:
            return f"{self.codebook} b{self.group_size}{' dq' if self.double_quant else ''}"
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.num_bits} {group} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """The integers that a linear's inputs are rounded to before the product.

    per: what shares a scale. dynamic: the scale is taken from the inputs at hand, not from calibration.
    """

    num_bits: int = 8
    per: Literal["token", "tensor"] = "token"
    symmetric: bool = True
    dynamic: bool = True


Part = Literal["weights", "activations", "sparsity", "rank"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """What becomes of one linear; a field that is None is left as it is. See the module's docstring.

    sparsity: a fraction in (0, 1) of weights that become zero, or "N:M": N of every M consecutive in_features stay.
    """

    weights: WeightGrid | None = None
    activations: ActivationGrid | None = None
    sparsity: float | str | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise LLMCompressError("an empty scheme changes nothing", f"choose one of {', '.join(PRESETS)}")
        if isinstance(self.sparsity, str):
            match = N_OF_M.fullmatch(self.sparsity)
            if match is None or not 0 < int(match[1]) < int(match[2]):
                raise LLMCompressError(f"sparsity {self.sparsity!r}: must be a fraction or N:M with N below M", "2:4")
        elif self.sparsity is not None and not 0 < self.sparsity < 1:
            raise LLMCompressError(f"sparsity {self.sparsity}: must lie between 0 and 1", "0.5 keeps half the weights")
        if self.rank is not None and self.rank < 1:
            raise LLMCompressError(f"rank {self.rank}: must be positive")

    @property
    def parts(self) -> frozenset[Part]:
        """Which fields ask for something."""
        names: tuple[Part, ...] = ("weights", "activations", "sparsity", "rank")
        return frozenset(name for name in names if getattr(self, name) is not None)

    @property
    def grid(self) -> WeightGrid:
        """The grid of the weights, where the scheme is known to have one."""
        assert self.weights is not None, "a scheme without a grid of weights"
        return self.weights

    def label(self) -> str:
        """A short name for tables.

        >>> Scheme(WeightGrid(8, -1), ActivationGrid(), "2:4").label()
        'int8 row sym, int8 inputs per token, 2:4 sparse'
        """
        pieces = [self.weights.label()] if self.weights else []
        if self.activations:
            pieces.append(f"int{self.activations.num_bits} inputs per {self.activations.per}")
        if self.sparsity is not None:
            pieces.append(f"{self.sparsity} sparse")
        return ", ".join([*pieces, *([f"rank {self.rank}"] if self.rank else [])])


def unserved(scheme: Scheme, served: frozenset[Part], what: str) -> str | None:
    """Why `what`, which serves only `served` of a scheme, cannot take this one, as one line; or None.

    >>> unserved(Scheme(WeightGrid(), rank=8), frozenset({"weights"}), "method gptq")
    'method gptq serves weights, not rank (int4 g128 sym, rank 8); choose a scheme without it, such as W4A16'
    """
    extra = sorted(scheme.parts - served)
    if not extra:
        return None
    return (
        f"{what} serves {' and '.join(sorted(served))}, not {' and '.join(extra)} ({scheme.label()}); "
        f"choose a scheme without {'it' if len(extra) == 1 else 'them'}, such as W4A16"
    )


PRESETS: dict[str, Scheme] = {
    "W2A16": Scheme(WeightGrid(2, 64)),
    "W3A16": Scheme(WeightGrid(3, 128)),
    "W4A16": Scheme(WeightGrid(4, 128)),
    "W8A16": Scheme(WeightGrid(8, 128)),
    "NF4": Scheme(WeightGrid(4, 64, codebook="nf4")),
    "NF4-DQ": Scheme(WeightGrid(4, 64, codebook="nf4", double_quant=True)),
}


def preset(name: str, where: str | None = None, **changes: Any) -> Scheme:
    """The scheme called `name`, with fields of its weights' grid replaced by those `changes` that are not None.

    Raises: LLMCompressError for an unknown name or a combination that does not exist.

    >>> preset("W4A16", group_size=64).label()
    'int4 g64 sym'
    """
    if name not in PRESETS:
        raise unknown("scheme", name, PRESETS, where)
    given = {key: value for key, value in changes.items() if value is not None}
    scheme = PRESETS[name]
    return replace(scheme, weights=replace(scheme.grid, **given)) if given else scheme
