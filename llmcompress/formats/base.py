"""The interface of an on-disk layout, and the set of those known.

A format turns one QuantizedWeight into the tensors that an engine expects under a linear's name, and back. It sees
local names (`qweight`, not `model.layers.0...qweight`) and never changes what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.registry import Registry


@dataclass(frozen=True, slots=True)
class Layout:
    """What a format must know of the whole checkpoint to write its config.

    schemes: scheme per quantized linear, in model order. skipped: linears left in full precision (module paths,
    `lm_head` included where the model has one). dtype: of the source's weights. actorder: "none" or "static".
    dampening_frac, method: recorded where the layout has a place for them. version: of llmcompress.
    """

    schemes: Mapping[str, WeightScheme]
    skipped: tuple[str, ...]
    dtype: torch.dtype
    method: str
    actorder: str
    dampening_frac: float
    version: str


class Format(Protocol):
    """One on-disk layout.

    readers: engines that load it, each with what that rests on: "tested" (our tests load it there) or "by its source"
    (its loader accepts the layout as written).
    """

    name: str
    summary: str
    readers: Mapping[str, str]

    def refuses(self, scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
        """Why this layout cannot hold such a linear (the rule and the way out, one line), or None."""
        ...

    def refuses_layout(self, layout: Layout) -> str | None:
        """Why this layout cannot describe this mix of schemes and skipped linears, or None."""
        ...

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Local tensor names to tensors, e.g. {"qweight": ..., "scales": ...}; `dtype` is the source weight's."""
        ...

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme, out_features: int, in_features: int
    ) -> QuantizedWeight:
        """The exact inverse of `pack`. Raises LLMCompressError naming a missing or misshapen tensor."""
        ...

    def suffixes(self, scheme: WeightScheme) -> tuple[str, ...]:
        """The local tensor names that `pack` writes for this scheme."""
        ...

    def quantization_config(self, layout: Layout) -> dict[str, Any]:
        """The object for config.json["quantization_config"]."""
        ...

    def extra_files(self, layout: Layout) -> dict[str, str]:
        """Further files of the folder, name to text (gptq: quantize_config.json)."""
        ...


FORMATS: Registry[Format] = Registry("format", "llmcompress.formats")
