"""Weights that share a Hessian solved as one, and one weight's rows solved in several processes.

Output rows are independent in every method, given the Hessian: the rows of q, k and v may be stacked (one factor
instead of three), and the stack may be cut between processes (each factors the Hessian, and solves its share):

    q ┐ stacked  ┌────────┐ cut    process 0 ──> codes ┐ gathered         ┌ q
    k ├────────> │  rows  │ ─────> process 1 ──> codes ┼────────> split ─>├ k
    v ┘          └────────┘        process 2 ──> codes ┘                  └ v

Scales kept in 8 bits are the exception: their blocks and their mean run over all rows of a linear. There each linear is
solved by itself, different ones in different processes.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from llmcompress.compress.weight import CompressedWeight, DenseWeight, QuantizedWeight
from llmcompress.distributed import World

Solve = Callable[[torch.Tensor], list[CompressedWeight]]
"""Rows of weights [O, I] -> solutions for them: the method's own, then what was made of it, always as many."""


def solve_rows(
    whole_OI: torch.Tensor, sizes: Sequence[int], solve: Solve, world: World, rows_depend: bool
) -> list[list[CompressedWeight]]:
    """For each of the linears stacked in `whole_OI`, its solutions; equal in all processes.

    sizes: out_features of each. rows_depend: whether rows of one linear have something in common beside the Hessian.
    Raises: what `solve` raises.
    """
    if rows_depend:
        mine = [solve(weight_OI) for weight_OI in whole_OI.split(list(sizes))[world.rank :: world.size]]
        shares = world.gather(mine)
        return [shares[index % world.size][index // world.size] for index in range(len(sizes))]
    mine_OI = whole_OI[world.share(len(whole_OI))]
    parts = [part for part in world.gather(solve(mine_OI) if len(mine_OI) else []) if part]
    versions = [split(joined(version), sizes) for version in zip(*parts, strict=True)]
    return [list(of_one) for of_one in zip(*versions, strict=True)]


def joined(parts: Sequence[CompressedWeight]) -> CompressedWeight:
    """The weight whose rows are those of `parts`, one after the other; of kinds that are a value a weight."""
    first = parts[0]
    if len(parts) == 1:
        return first
    assert isinstance(first, (DenseWeight, QuantizedWeight)), f"{type(first).__name__} has no rows of its own"
    joined_fields: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in _row_fields(first)
    }
    return replace(first, **joined_fields)


def split(weight: CompressedWeight, sizes: Sequence[int]) -> list[CompressedWeight]:
    """The weight in parts of `sizes` rows, each in memory of its own; kinds as in `joined`."""
    if len(sizes) == 1:
        return [weight]
    assert isinstance(weight, (DenseWeight, QuantizedWeight)), f"{type(weight).__name__} has no rows of its own"
    pieces = {name: getattr(weight, name).split(list(sizes)) for name in _row_fields(weight)}
    return [
        replace(weight, **{name: of_field[index].clone() for name, of_field in pieces.items()})
        for index in range(len(sizes))
    ]


def _row_fields(weight: DenseWeight | QuantizedWeight) -> list[str]:
    """The tensors of a weight that have a row for each of its own."""
    names = ("weight_OI", "codes_OI", "scale_OG", "zero_point_OG", "mask_OI")
    return [name for name in names if getattr(weight, name, None) is not None]
