"""How new values are chosen: three protocols, by what a method may change, each method one file.

    LinearMethod   the values of one linear           rtn, gptq
    UnitMethod     which units of a block stay        FFN columns, groups of heads, hidden channels
    DepthMethod    which blocks stay

A method declares the statistics that it `needs`; the stream of calibration text accumulates these and no others. Where
several methods solve on a Hessian they share its settings, so that there is one default of each. Free of torch, so that
plans and `--help` can ask what a method needs: a method imports its solver when it is used.

Shapes: O out_features, I in_features, U units of a block, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from llmcompress.compress.scheme import Part, Scheme
from llmcompress.registry import Registry

if TYPE_CHECKING:
    import torch

    from llmcompress.compress.statistics import Statistics
    from llmcompress.compress.weight import CompressedWeight

Need = Literal["hessian", "shift", "mean", "absmax", "fisher"]
"""hessian: mean of x x^T, and that of held-out tokens. shift: how far the original's inputs are from those that are
read. mean, absmax: of x, by input. fisher: mean of g g^T, g the gradient at the linear's output."""
ACCUMULATED: frozenset[Need] = frozenset({"hessian", "shift"})
"""What the stream can accumulate today."""


class MethodSettings(BaseModel):
    """The knobs of a method: none, unless it declares some."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HessianSettings(MethodSettings):
    """The knobs of every method that solves on a Hessian."""

    dampening_frac: float = Field(0.05, gt=0, lt=1, description="added to diag(H), as a fraction of mean diag(H)")


class LinearMethod(Protocol):
    """Chooses the values of linears that read one tensor.

    needs: statistics of that tensor. makes: the parts of a scheme that it serves. settings: its typed knobs, a
    `HessianSettings` where it needs the Hessian. rows_independent: whether a row of the weight, given the statistics,
    is solved without regard to the others, so that linears may be stacked and their rows cut over processes.
    """

    name: str
    summary: str
    needs: frozenset[Need]
    makes: frozenset[Part]
    rows_independent: bool
    settings: type[MethodSettings]

    def solve(
        self, weight_OI: torch.Tensor, seen: Statistics | None, scheme: Scheme, scale_dtype: torch.dtype,
        settings: MethodSettings,
    ) -> CompressedWeight:  # fmt: skip
        """The weight that `scheme` asks for, in place of `weight_OI` (float32 or float64, computed in as it is).

        seen: None where the method needs nothing. scale_dtype: of the source's weights, which decides what a scale is
        snapped to. Inputs are never changed.
        Raises: LLMCompressError for a weight or statistics that are not finite or cannot be factored.
        """
        ...


class UnitMethod(Protocol):
    """Chooses which units of a block stay, and mends the linear that reads them.

    A unit is a column of the reader (`down_proj`, `o_proj`) with the rows of the linears that write it. kinds: what it
    can choose among, e.g. "ffn", "kv_group", "hidden".
    """

    name: str
    summary: str
    needs: frozenset[Need]
    kinds: frozenset[str]
    settings: type[MethodSettings]

    def select(
        self, reader_OU: torch.Tensor, seen: Statistics | None, num_keep: int, settings: MethodSettings
    ) -> torch.Tensor:
        """The units that stay, int64 [num_keep], ascending.

        What the reader loses is made up for by least squares, the same for all methods: W H[:, S] H[S, S]^-1.
        Raises: LLMCompressError for statistics that are not finite.
        """
        ...


class DepthMethod(Protocol):
    """Chooses which blocks a shallower model keeps."""

    name: str
    summary: str
    settings: type[MethodSettings]

    def rank(self, moments: Sequence[Mapping[str, torch.Tensor]], settings: MethodSettings) -> list[int]:
        """Blocks from the most dispensable to the least.

        moments: per block, means over tokens of products of its input and output states (`xx`, `xy`, `yy`: [H, H]).
        """
        ...


METHODS: Registry[LinearMethod] = Registry("method", "llmcompress.compress.methods")
