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

import torch

from llmcompress.compress.weight import QuantizedWeight
from llmcompress.distributed import World

Solve = Callable[[torch.Tensor], list[QuantizedWeight]]
"""Rows of weights [O, I] -> solutions for them: the method's own, then what was made of it, always as many."""


def solve_rows(
    whole_OI: torch.Tensor, sizes: Sequence[int], solve: Solve, world: World, rows_depend: bool
) -> list[list[QuantizedWeight]]:
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


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The weight whose rows are those of `parts`, one after the other."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_point_OG for part in parts if part.zero_point_OG is not None]
    return replace(
        parts[0],
        codes_OI=torch.cat([part.codes_OI for part in parts]),
        scale_OG=torch.cat([part.scale_OG for part in parts]),
        zero_point_OG=torch.cat(zeros) if zeros else None,
    )


def split(weight: QuantizedWeight, sizes: Sequence[int]) -> list[QuantizedWeight]:
    """The weight in parts of `sizes` rows."""
    if len(sizes) == 1:
        return [weight]
    zeros = [None] * len(sizes) if weight.zero_point_OG is None else weight.zero_point_OG.split(list(sizes))
    return [
        replace(weight, codes_OI=codes_OI.clone(), scale_OG=scale_OG.clone(), zero_point_OG=zero_OG)
        for codes_OI, scale_OG, zero_OG in zip(
            weight.codes_OI.split(list(sizes)), weight.scale_OG.split(list(sizes)), zeros, strict=True
        )
    ]
