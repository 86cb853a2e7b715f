"""The interface of a quantization method, and the set of those known."""

from __future__ import annotations

from typing import Protocol

import torch
from pydantic import BaseModel

from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.registry import Registry


class Method(Protocol):
    """How codes are chosen.

    settings: the typed knobs. needs_hessian: whether calibration text is read.
    """

    name: str
    summary: str
    needs_hessian: bool
    settings: type[BaseModel]

    def solve(
        self,
        weight_OI: torch.Tensor,
        hessian_II: torch.Tensor | None,
        scheme: WeightScheme,
        scale_dtype: torch.dtype,
        settings: BaseModel,
    ) -> QuantizedWeight:
        """Codes for `weight_OI` on the grid of `scheme`; inputs are never changed.

        Raises: LLMCompressError for a weight or Hessian that is not finite or cannot be factored.
        """
        ...


METHODS: Registry[Method] = Registry("method", "llmcompress.compress.methods")
