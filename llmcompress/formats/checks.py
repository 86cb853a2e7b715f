"""What every layout checks alike: the group size, a scale's exactness, and a tensor read back from a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmcompress.compress.scheme import WeightScheme
from llmcompress.errors import LLMCompressError


def group_refusal(scheme: WeightScheme, in_features: int) -> str | None:
    """Why groups of this scheme do not tile a row of `in_features`, or None."""
    if in_features % scheme.group_width(in_features):
        return (
            f"group_size {scheme.group_size} does not divide in_features {in_features}; "
            "choose a divisor, or -1 for one scale per row"
        )
    return None


def nothing_quantized(schemes: Mapping[str, WeightScheme]) -> str | None:
    """Why a checkpoint without a quantized linear cannot be described, or None."""
    return None if schemes else "no linear is quantized; quantize at least one, or copy the checkpoint as it is"


def cast_exactly(scale: torch.Tensor, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """A copy of float32 `scale` in `dtype`, contiguous, with no value changed.

    Raises: LLMCompressError when a value is not representable: the file would not hold what the solver worked with.
    """
    cast = scale.to(dtype, copy=True).contiguous()
    wrong = cast.to(torch.float32) != scale
    if bool(wrong.any()):
        value = scale[wrong][0].item()
        raise LLMCompressError(
            f"{layout} stores scales as {dtype_name(dtype)}, which cannot hold {int(wrong.sum())} of {scale.numel()} "
            f"of them exactly (the first is {value!r})",
            "write this layout from its own run, so that its scales are rounded before the codes are chosen",
        )
    return cast


def take(
    tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> torch.Tensor:
    """The tensor `name` as a file gave it. `dtype` None allows any.

    Raises: LLMCompressError naming the tensor that is missing or of another dtype or shape.
    """
    if name not in tensors:
        raise LLMCompressError(f"tensor {name} is missing; found {', '.join(sorted(tensors)) or 'none'}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise LLMCompressError(f"tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise LLMCompressError(f"tensor {name} is {dtype_name(tensor.dtype)}, expected {dtype_name(dtype)}")
    return tensor


def dtype_name(dtype: torch.dtype) -> str:
    """The name that configs use.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
