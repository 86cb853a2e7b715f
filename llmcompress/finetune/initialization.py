"""Initialization of an adapter on an NF4 base: its first factors are what quantizing lost, linear by linear.

A fresh adapter adds nothing, so training begins at the quantized model. The residual R = W - Q is known; the best
B A of rank r for it is its truncated SVD, which is LoftQ's first iteration (Li et al. 2023). Best for the weight,
though, is not best for the output: over inputs with H = mean of x x^T the output error is

    ||(R - B A) X||^2 / T  =  ||(R - B A) S||_F^2        with S S = H, S = H^(1/2)

so the truncated SVD of R S, with S undone in A, is the best one for what the layer computes (the same weighting as in
EoRA, Liu et al. 2024):

    R S = U Z V^T      B = U_r Z_r^(1/2)      A = Z_r^(1/2) V_r^T S^(-1)

For `init: residual` the Hessians come from training rows that flow through the quantized model, as many linears at a
time as memory allows; for `loftq` the weights alone count. The full-precision weights are read from the checkpoint one
by one.

Shapes: O out_features, I in_features, R rank, B rows, S tokens, T tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.methods.base import METHODS
from llmcompress.compress.scheme import Scheme
from llmcompress.console import Progress
from llmcompress.data.collate import Example, collate
from llmcompress.errors import LLMCompressError
from llmcompress.finetune.base import BasePlan
from llmcompress.models import meta as skeleton

HESSIAN_BYTES = 2 << 30
"""Hessians that are accumulated in one pass through the model take no more than this."""
DAMPENING_FRAC = 1e-4
"""Added to the diagonal of H, as a fraction of its mean: directions that no input took still need an inverse."""

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def require_residual(plan: BasePlan, init: str, name: str) -> None:
    """Raise unless the base has lost something and the original weights are there to say what.

    Raises: LLMCompressError.
    """
    if init == "default":
        return
    if not plan.nf4:
        raise LLMCompressError(f"init {init}: the base is in full precision, so nothing was lost", "use init: default")
    if plan.stored:
        raise LLMCompressError(
            f"init {init}: {name} holds NF4 codes and no full-precision weights to compare them with",
            "give the full-precision checkpoint with base: nf4, or use init: default",
        )


def first_factors(
    source: Checkpoint, model: nn.Module, plan: BasePlan, targets: Sequence[str], rank: int,
    rows: Sequence[Example] | None, padding: int, progress: Progress,
) -> Factors:  # fmt: skip
    """B [O, R] and A [R, I] for every target that is NF4 in `model`; weighted by the inputs where `rows` are given."""
    names = [name for name in targets if name in set(plan.linears)]
    dense, factors = quantized_weight(source, plan.scheme), {}
    stored = skeleton.stored_names(skeleton.build(source), source.stored)
    with progress.step("factors of what quantization lost", len(names)) as bar:
        for group in _groups(model, names) if rows else [names]:
            hessians = _hessians(model, group, rows, padding) if rows else {}
            for name in group:
                tensor = stored[f"{name}.weight"]
                residual_OI = source.tensor(tensor).float() - dense(tensor)
                factors[name] = residual_factors(residual_OI, rank, hessians.get(name))
                bar.advance(1, name)
    return factors


def quantized_weight(source: Checkpoint, scheme: Scheme | None) -> Callable[[str], torch.Tensor]:
    """A function from a tensor's name to the NF4 values that it has on the base, [O, I] float32."""
    assert scheme is not None, "a base that is not quantized has no NF4 values"
    rtn = METHODS.get("rtn")

    def dense(tensor: str) -> torch.Tensor:
        weight_OI = source.tensor(tensor).float().contiguous()
        return rtn.solve(weight_OI, None, scheme, torch.float32, rtn.settings()).dequantize()

    return dense


def _groups(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in names:
        own = 4 * _in_features(model, name) ** 2
        if group and size + own > HESSIAN_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group


def _in_features(model: nn.Module, name: str) -> int:
    return int(getattr(model.get_submodule(name), "in_features", 0))


def _hessians(model: Any, names: Sequence[str], rows: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """Mean of x x^T over the tokens of `rows`, [I, I] float32 by linear; one row at a time, so nothing is padded."""
    sums = {name: torch.zeros(size, size) for name in names for size in [_in_features(model, name)]}
    count = 0

    def add(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] += (x_TI.t() @ x_TI).cpu()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    try:
        with torch.no_grad():
            for row in rows:
                batch = collate([row], padding)
                del batch["labels"]
                model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False)
                count += len(row.ids)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / max(count, 1) for name, total in sums.items()}


def residual_factors(
    residual_OI: torch.Tensor, rank: int, hessian_II: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [O, R] and A [R, I], float32, whose product is closest to the residual; on the outputs where H is given.

    A rank above the smaller side is filled up with zeros. Computed in float64.
    """
    residual = residual_OI.double()
    if hessian_II is None:
        left_OK, size_K, right_KI = torch.linalg.svd(residual, full_matrices=False)
    else:
        hessian = hessian_II.double()
        mean = hessian.diagonal().mean()
        values_I, basis_II = torch.linalg.eigh(hessian)
        # above zero, so that there is an inverse; H = 0 counts as the identity
        values_I = values_I.clamp(min=0) + DAMPENING_FRAC * mean if bool(mean > 0) else torch.ones_like(values_I)
        scaled_OI = (residual @ basis_II * values_I.sqrt()) @ basis_II.t()
        left_OK, size_K, right_KI = torch.linalg.svd(scaled_OI, full_matrices=False)
        right_KI = (right_KI @ basis_II / values_I.sqrt()) @ basis_II.t()
    kept = min(rank, len(size_K))
    root_K = size_K[:kept].sqrt()
    b_OR = torch.zeros(residual.shape[0], rank, dtype=torch.float64)
    a_RI = torch.zeros(rank, residual.shape[1], dtype=torch.float64)
    b_OR[:, :kept] = left_OK[:, :kept] * root_K
    a_RI[:kept] = root_K[:, None] * right_KI[:kept]
    return b_OR.float(), a_RI.float()
