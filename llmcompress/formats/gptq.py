"""The GPTQ layout, version 1: what vLLM, SGLang, GPTQModel and transformers + optimum read.

Per linear of O outputs and I inputs, b bits and G groups along the input:

    qweight  int32   [I * b / 32, O]   codes packed along the input, lowest code in the lowest bits
    qzeros   int32   [G, O * b / 32]   zero points minus one, packed along the output
    scales   float16 [G, O]            weight = scale * (code - zero point)
    g_idx    int32   [I]               group of each input

The "minus one" is version 1's quirk: readers add it back, and a zero point of 0 cannot be written, which is why the
layout takes symmetric schemes only. The columns lie in their natural order, so g_idx is i // group width; it is written
because some readers index with it and fail without. The config must be the same for all linears: engines read one
`bits` and one `group_size`, and those that know per-module rules disagree about them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.compress.scheme import Scheme, WeightGrid
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import (
    DeclaredGrid,
    Layout,
    Package,
    cast_exactly,
    declared_grids,
    integer_grid_refusal,
    nothing_compressed,
    take,
)
from llmcompress.formats.bitpack import WORD_BITS, WORD_BYTES, num_words, pack_words, unpack_words

if TYPE_CHECKING:
    import torch

    from llmcompress.checkpoint.safetensors import StoredTensor
    from llmcompress.compress.weight import CompressedWeight, QuantizedWeight

_BITS = (4, 8)
_GROUP_SIZES = (-1, 32, 64, 128)
_TILE = 32
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BLOCK = re.compile(r"(?P<block>.*?\.\d+)\.(?P<local>.+)")


class Gptq:
    """GPTQ version 1, symmetric."""

    name = "gptq"
    summary = "GPTQ v1, int4 and int8, symmetric"
    readers: Mapping[str, str] = {
        "transformers + optimum + gptqmodel": "by its source",
        "vLLM": "by its source",
        "SGLang": "by its source",
    }

    quant_method = "gptq"
    packages = (Package("optimum", "optimum"), Package("gptqmodel", "GPTQModel"))
    kernels = "the engine's own kernels on the packed weights"
    module_classes = frozenset({"Linear", "Conv1D"})
    keeps_dtypes = False
    float16_scales = True
    marker = "qweight"
    groups: tuple[str, int] | None = ("scales", 0)

    def is_default_for(self, scheme: Scheme) -> bool:
        """Never: compressed_tensors holds the same grids and needs less to be run."""
        return False

    def refuses(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Why no engine would read such a linear, or None."""
        if reason := integer_grid_refusal(scheme, in_features, self.name):
            return reason
        grid = scheme.grid
        if not grid.symmetric:
            return (
                "gptq v1 stores the zero point minus one, so asymmetric schemes overflow, and vLLM and SGLang ignore "
                "zero points; write compressed_tensors"
            )
        if grid.num_bits not in _BITS:
            return f"vLLM and SGLang refuse {grid.num_bits} bits in the gptq layout; write compressed_tensors"
        if grid.group_size not in _GROUP_SIZES:
            sizes = ", ".join(map(str, _GROUP_SIZES))
            return (
                f"vLLM and SGLang read group_size {sizes} in the gptq layout, not {grid.group_size}; "
                "choose one of these or write compressed_tensors"
            )
        for label, width in (("in_features", in_features), ("out_features", out_features)):
            if width % _TILE:
                return (
                    f"{label} {width} is no multiple of {_TILE}, which gptq kernels need; "
                    "ignore this linear or write compressed_tensors"
                )
        return None

    def refuses_layout(self, layout: Layout) -> str | None:
        """Why one `bits`, one `group_size` and one list of modules per decoder layer do not describe it, or None."""
        labels = sorted({scheme.label() for scheme in layout.schemes.values()})
        if len(labels) > 1:
            return (
                f"the gptq layout has one scheme for the whole checkpoint, not {' and '.join(labels)}; "
                "write compressed_tensors"
            )
        return nothing_compressed(layout.schemes) or _outside(layout.schemes) or _unequal(layout) or _split(layout)

    def packed_bytes(self, scheme: Scheme, out_features: int, in_features: int, dtype: str) -> int:
        """Words of codes and of zero points, float16 scales, and a group for every input."""
        grid = scheme.grid
        groups = grid.num_groups(in_features)
        codes = num_words(in_features, grid.num_bits) * WORD_BYTES * out_features
        zeros = num_words(out_features, grid.num_bits) * WORD_BYTES * groups
        return codes + zeros + 2 * out_features * groups + 4 * in_features

    def pack(self, weight: CompressedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """qweight, qzeros, scales and g_idx; scales are float16 whatever `dtype` is.

        Raises: LLMCompressError when a scale is not a float16 value.
        """
        import torch

        from llmcompress.compress.weight import QuantizedWeight

        assert isinstance(weight, QuantizedWeight), "gptq holds codes"
        num_bits, in_features = weight.grid.num_bits, weight.codes_OI.shape[1]
        zero = weight.zero_point_OG
        assert zero is not None and bool((zero == 1 << (num_bits - 1)).all()), "gptq v1 is symmetric"
        return {
            "qweight": pack_words(weight.codes_OI, num_bits).T.contiguous(),
            "qzeros": pack_words((zero - 1).T.contiguous(), num_bits),
            "scales": cast_exactly(weight.scale_OG.T, torch.float16, self.name),
            "g_idx": _group_of_input(weight.grid, in_features).to(weight.codes_OI.device),
        }

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, out_features: int, in_features: int
    ) -> QuantizedWeight:
        """The weight that these tensors hold.

        Raises: LLMCompressError for a missing or misshapen tensor, or a g_idx that reorders inputs.
        """
        import torch

        from llmcompress.compress.weight import QuantizedWeight

        grid = scheme.grid
        num_bits, groups = grid.num_bits, grid.num_groups(in_features)
        qweight = take(tensors, "qweight", torch.int32, (num_words(in_features, num_bits), out_features))
        qzeros = take(tensors, "qzeros", torch.int32, (groups, num_words(out_features, num_bits)))
        scales = take(tensors, "scales", torch.float16, (groups, out_features))
        g_idx = take(tensors, "g_idx", torch.int32, (in_features,))
        if not torch.equal(g_idx.cpu(), _group_of_input(grid, in_features)):
            raise LLMCompressError("tensor g_idx reorders the inputs; this layout is written with i // group_size")
        zero_GO = unpack_words(qzeros, num_bits, out_features) + 1
        return QuantizedWeight(
            codes_OI=unpack_words(qweight.T, num_bits, in_features),
            scale_OG=scales.T.to(torch.float32).contiguous(),
            zero_point_OG=zero_GO.T.contiguous(),
            codebook=None,
            grid=grid,
        )

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The four local names."""
        return ("qweight", "qzeros", "scales", "g_idx")

    def quantization_config(self, layout: Layout) -> dict[str, Any]:
        """The object of config.json, with both spellings of the keys that engines disagree about."""
        grid = next(iter(layout.schemes.values())).grid
        config: dict[str, Any] = {
            "quant_method": self.quant_method,
            "method": "gptq",
            "checkpoint_format": "gptq",
            "format": "gptq",
            "bits": grid.num_bits,
            "group_size": grid.group_size,
            "sym": True,
            "desc_act": False,
            "static_groups": layout.knobs.get("actorder") == "static",
            "true_sequential": True,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"llmcompress:{layout.version}"], "solver": layout.method},
        }
        if "dampening_frac" in layout.knobs:  # left out by a method that does not damp: loaders need no value
            config["damp_percent"] = layout.knobs["dampening_frac"]
        if any(_BLOCK.fullmatch(name) for name in layout.skipped):
            config["modules_in_block_to_quantize"] = [[local] for local in _locals(layout.schemes)]
        return config

    def extra_files(self, layout: Layout) -> dict[str, str]:
        """quantize_config.json, the same object: GPTQModel looks there first."""
        return {"quantize_config.json": json.dumps(self.quantization_config(layout), indent=2) + "\n"}

    def declared(self, config: Mapping[str, Any]) -> list[DeclaredGrid]:
        """One grid for all linears."""
        return declared_grids(config)

    def packed_shape(self, marker: StoredTensor, grids: Sequence[DeclaredGrid]) -> tuple[int, int] | None:
        """From the words of codes: their rows are inputs."""
        bits = grids[0].width if len(grids) == 1 else None
        if bits is None or len(marker.shape) != 2:
            return None
        return marker.shape[1], marker.shape[0] * WORD_BITS // bits


def _group_of_input(grid: WeightGrid, in_features: int) -> torch.Tensor:
    """int32 [I]: i // group width."""
    import torch

    return torch.arange(in_features, dtype=torch.int32) // grid.group_width(in_features)


def _locals(names: Iterable[str]) -> list[str]:
    """Paths inside a decoder layer, each once, in model order."""
    matches = (_BLOCK.fullmatch(name) for name in names)
    return list(dict.fromkeys(match["local"] for match in matches if match))


def _outside(schemes: Mapping[str, Scheme]) -> str | None:
    """A quantized linear that lies in no decoder layer: loaders of this layout never look there."""
    for name in schemes:
        if not _BLOCK.fullmatch(name):
            return (
                f"{name} is quantized and lies outside the decoder layers, where gptq loaders expect full precision; "
                "ignore it or write compressed_tensors"
            )
    return None


def _unequal(layout: Layout) -> str | None:
    """A linear that is skipped here and quantized in another layer.

    The config names modules per layer, and readers match those names as a suffix (optimum) or anywhere in the path
    (vLLM), so a skipped linear must not match any of them.
    """
    quantized = _locals(layout.schemes)
    for name in layout.skipped:
        match = next((local for local in quantized if local in name), None)
        if match and _BLOCK.fullmatch(name):
            return (
                f"{name} is in full precision while {match} of another decoder layer is quantized, and the gptq layout "
                "skips a linear in all layers or in none; ignore it in all of them or write compressed_tensors"
            )
    return None


def _split(layout: Layout) -> str | None:
    """A skipped linear whose siblings, which engines fuse with it into one, are quantized."""
    for name in layout.skipped:
        parent, _, last = name.rpartition(".")
        siblings = next((group for group in _FUSED if last in group), ())
        for sibling in siblings:
            if f"{parent}.{sibling}" in layout.schemes:
                return (
                    f"{name} is in full precision and {sibling} beside it is quantized, but vLLM and SGLang fuse "
                    f"{', '.join(siblings)}; treat them alike or write compressed_tensors"
                )
    return None


ENTRY = Gptq()
