"""Pre-quantized NF4 as bitsandbytes stores it, so that plain transformers + bitsandbytes loads it as it is.

The weight is read row by row in blocks of 64 entries, which for rows of a multiple of 64 are groups along the input:

    weight                                uint8   [O * I / 2, 1]   two codes a byte, the earlier in the high half
    weight.absmax                         float32 [O * G]          the scales, row-major
    weight.quant_map                      float32 [16]             the codebook
    weight.quant_state.bitsandbytes__nf4  uint8   [n]              JSON: quant_type, blocksize, dtype, shape

With double quantization (QLoRA, Dettmers et al. 2023, section 3) the scales are 8-bit codes in blocks of 256, stretched
by a float32 each, around one offset:

    weight.absmax                         uint8   [O * G]
    weight.nested_absmax                  float32 [ceil(O * G / 256)]
    weight.nested_quant_map               float32 [256]            the 8-bit dynamic map; JSON gains nested_*

The codebook is stored but never honoured: the kernels hold NF4 themselves. What a solver may choose is the codes and
the scales, which need not be the largest entry of their block.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.compress.scheme import CODEBOOKS, Scheme, WeightGrid, unserved
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import (
    EXPERT,
    WEIGHTS,
    DeclaredGrid,
    Layout,
    Package,
    declared_grids,
    dtype_name,
    nothing_compressed,
    take,
)
from llmcompress.formats.bitpack import pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    import torch

    from llmcompress.checkpoint.safetensors import StoredTensor
    from llmcompress.compress.weight import CompressedWeight, NestedScale, QuantizedWeight

_STATE = "weight.quant_state.bitsandbytes__nf4"
_BLOCK = CODEBOOKS["nf4"].group_size
_SCALE_BLOCK = 256
_CPU_ROWS = 32


class BitsAndBytes:
    """NF4, with or without double quantization."""

    name = "bitsandbytes"
    summary = "NF4, pre-quantized, with or without double quantization"
    readers: Mapping[str, str] = {"transformers + bitsandbytes": "tested", "SGLang": "by its source"}
    quant_method = "bitsandbytes"
    packages = (Package("bitsandbytes", "bitsandbytes"),)
    kernels = "the engine's own kernels on the packed weights"
    module_classes = frozenset({"Linear", "Conv1D"})
    keeps_dtypes = True
    float16_scales = False
    marker = _STATE
    groups: tuple[str, int] | None = None

    def is_default_for(self, scheme: Scheme) -> bool:
        """NF4."""
        return scheme.parts == {"weights"} and scheme.grid.codebook == "nf4"

    def refuses(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Why bitsandbytes would not run such a linear, or None."""
        if reason := unserved(scheme, WEIGHTS, f"format {self.name}"):
            return reason
        if scheme.grid.codebook != "nf4":
            return f"bitsandbytes holds NF4, not {scheme.label()}; write compressed_tensors, or choose scheme NF4"
        if in_features % _BLOCK:
            return (
                f"in_features {in_features} is no multiple of {_BLOCK}, so blocks of bitsandbytes would cross rows "
                "and its CPU kernel fails; ignore this linear"
            )
        if out_features % _CPU_ROWS:
            return (
                f"out_features {out_features} is no multiple of {_CPU_ROWS}, which the CPU kernel of bitsandbytes "
                "needs; ignore this linear"
            )
        return None

    def refuses_layout(self, layout: Layout) -> str | None:
        """Why one set of flags and a list of modules to skip do not describe it, or None."""
        labels = sorted({scheme.label() for scheme in layout.schemes.values()})
        if len(labels) > 1:
            return f"bitsandbytes has one scheme for the whole checkpoint, not {' and '.join(labels)}; choose one"
        return nothing_compressed(layout.schemes) or _experts(layout) or _skipped_too(layout)

    def packed_bytes(self, scheme: Scheme, out_features: int, in_features: int, dtype: str) -> int:
        """Nibbles, scales in 32 or 8 bits, the maps, and a JSON object of about 110 bytes."""
        groups = out_features * scheme.grid.num_groups(in_features)
        nested = -(-groups // _SCALE_BLOCK) * 4 + 256 * 4 + 75
        scales = groups + nested if scheme.grid.double_quant else 4 * groups
        return out_features * in_features // 2 + scales + 16 * 4 + 85

    def pack(self, weight: CompressedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors of the module's docstring; `dtype` is what bitsandbytes dequantizes to."""
        import torch

        from llmcompress.compress.nested_scales import BLOCK, dynamic_map, unnest
        from llmcompress.compress.weight import QuantizedWeight

        assert isinstance(weight, QuantizedWeight) and weight.codebook is not None, "bitsandbytes holds a codebook"
        assert torch.equal(weight.codebook.cpu(), _table()), "kernels know NF4 and no other codebook"
        shape = list(weight.codes_OI.shape)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": _BLOCK}
        state |= {"dtype": dtype_name(dtype), "shape": shape}
        tensors = {"weight": pack_nibbles(weight.codes_OI).unsqueeze(1), "weight.quant_map": _table()}
        if weight.grid.double_quant:
            nested = weight.nested
            assert nested is not None, "double_quant without the 8-bit form of the scales"
            assert torch.equal(unnest(nested, shape[0]), weight.scale_OG), "scales differ from their 8-bit form"
            tensors["weight.absmax"] = nested.codes.clone().contiguous()
            tensors["weight.nested_absmax"] = nested.absmax.clone().contiguous()
            tensors["weight.nested_quant_map"] = dynamic_map().clone()
            state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset.item()}
        else:
            tensors["weight.absmax"] = weight.scale_OG.reshape(-1).clone()
        tensors[_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, out_features: int, in_features: int
    ) -> QuantizedWeight:
        """The weight that these tensors hold.

        Raises: LLMCompressError for a missing or misshapen tensor, another codebook, or a state that contradicts it.
        """
        import torch

        from llmcompress.compress.nested_scales import unnest
        from llmcompress.compress.weight import QuantizedWeight

        grid = scheme.grid
        shape = (out_features, grid.num_groups(in_features))
        packed = take(tensors, "weight", torch.uint8, (out_features * in_features // 2, 1))
        state = _state(tensors, grid, [out_features, in_features])
        _require_map(tensors, "weight.quant_map", _table())
        nested = None
        if grid.double_quant:
            nested = _nested(tensors, math.prod(shape), state)
            scale = unnest(nested, out_features)
        else:
            scale = take(tensors, "weight.absmax", torch.float32, (math.prod(shape),)).clone().reshape(shape)
        codes = unpack_nibbles(packed).reshape(out_features, in_features)
        return QuantizedWeight(codes, scale, None, _table(codes.device), grid, nested)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The local names; the nested ones only with double quantization."""
        names = ("weight", "weight.absmax", "weight.quant_map", _STATE)
        return (*names, "weight.nested_absmax", "weight.nested_quant_map") if scheme.grid.double_quant else names

    def quantization_config(self, layout: Layout) -> dict[str, Any]:
        """The object of config.json. An absent list of skipped modules would mean the engine's guess; ours is said."""
        scheme = next(iter(layout.schemes.values()))
        return {
            "quant_method": self.quant_method,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": scheme.grid.double_quant,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": dtype_name(layout.dtype),
            "llm_int8_skip_modules": list(layout.skipped),
        }

    def extra_files(self, layout: Layout) -> dict[str, str]:
        """None: engines read config.json."""
        return {}

    def declared(self, config: Mapping[str, Any]) -> list[DeclaredGrid]:
        """None where the config is NF4's own, which has no word for the grid."""
        return declared_grids(config)

    def packed_shape(self, marker: StoredTensor, grids: Sequence[DeclaredGrid]) -> tuple[int, int] | None:
        """From the few bytes of JSON beside the codes, which are flat."""
        try:
            shape = json.loads(b"".join(marker.chunks()))["shape"]
            return int(shape[0]), int(shape[1])
        except (ValueError, KeyError, IndexError, TypeError):
            return None


def _table(device: torch.device | None = None) -> torch.Tensor:
    """NF4, float32 [16]."""
    import torch

    return torch.tensor(CODEBOOKS["nf4"].values, dtype=torch.float32, device=device)


def _nested(tensors: Mapping[str, torch.Tensor], num_scales: int, state: Mapping[str, Any]) -> NestedScale:
    """The 8-bit scales of a file."""
    import torch

    from llmcompress.compress.nested_scales import BLOCK, dynamic_map
    from llmcompress.compress.weight import NestedScale

    _require_map(tensors, "weight.nested_quant_map", dynamic_map())
    codes = take(tensors, "weight.absmax", torch.uint8, (num_scales,))
    absmax = take(tensors, "weight.nested_absmax", torch.float32, (-(-num_scales // BLOCK),))
    if state.get("nested_blocksize") != BLOCK or "nested_offset" not in state:
        raise LLMCompressError(f"tensor {_STATE} lacks nested_offset, or nested_blocksize is not {BLOCK}")
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
    return NestedScale(codes.clone(), absmax.clone(), offset)


def _require_map(tensors: Mapping[str, torch.Tensor], name: str, expected: torch.Tensor) -> None:
    """Raises: LLMCompressError unless the stored map is the one that kernels use."""
    import torch

    stored = take(tensors, name, torch.float32, tuple(expected.shape))
    if not torch.equal(stored.cpu(), expected):
        raise LLMCompressError(f"tensor {name} is another map than the one that bitsandbytes computes with")


def _state(tensors: Mapping[str, torch.Tensor], grid: WeightGrid, shape: list[int]) -> dict[str, Any]:
    """The JSON object beside the weight, checked against the scheme."""
    if _STATE not in tensors:
        raise LLMCompressError(f"tensor {_STATE} is missing; found {', '.join(sorted(tensors)) or 'none'}")
    try:
        state = json.loads(bytes(tensors[_STATE].tolist()))
    except (ValueError, TypeError) as error:
        raise LLMCompressError(f"tensor {_STATE} is not JSON: {error}") from error
    expected = {"quant_type": "nf4", "blocksize": grid.group_size, "shape": shape}
    for key, value in expected.items():
        if not isinstance(state, dict) or state.get(key) != value:
            raise LLMCompressError(f"tensor {_STATE} does not say {key} {value}")
    return dict(state)


def _experts(layout: Layout) -> str | None:
    """An expert of a mixture: no loader puts it into the tensor in which transformers holds them all."""
    first = next((name for name in layout.schemes if EXPERT.fullmatch(name)), None)
    if first is None:
        return None
    return (
        f"{first} is an expert, and transformers holds a layer's experts in one tensor of three dimensions, for which "
        "bitsandbytes has no form; choose W4A16 and compressed_tensors, or --ignore '*.experts.*'"
    )


def _skipped_too(layout: Layout) -> str | None:
    """A quantized linear that transformers would skip with another: it matches names as suffix or leading pattern."""
    for skipped in layout.skipped:
        for name in layout.schemes:
            if name.endswith(skipped) or re.match(rf"(?:{skipped})(?:\.|$)", name):
                return (
                    f"{name} is quantized, but transformers takes it for the skipped {skipped}, which ends or begins "
                    "alike; quantize or ignore both"
                )
    return None


ENTRY = BitsAndBytes()
