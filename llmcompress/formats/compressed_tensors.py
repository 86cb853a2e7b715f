"""The `pack-quantized` layout of compressed-tensors: vLLM's own format, and plain transformers with that package.

Per linear of O outputs and I inputs, b bits and G groups along the input:

    weight_packed      int32 [O, ceil(I * b / 32)]   codes packed along the input, lowest code in the lowest bits
    weight_scale       [O, G], in the model's dtype
    weight_shape       int64 [2] = (O, I)
    weight_zero_point  int32 [ceil(O * b / 32), G]   packed along the output; only where the scheme is asymmetric

The engine thinks in signed integers, code - 2**(b - 1), and adds the offset back when it packs, so the words hold our
codes as they are. It takes every integer scheme; the config lists one group of linears per scheme.

transformers 5 sizes its empty model for unpacked zero points, so an asymmetric checkpoint fails to load there unless
its config asks for dense weights (`dequantize`), which other readers ignore. On that path it reads one scheme for the
whole checkpoint, so a mix with an asymmetric part is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.checkpoint.safetensors import DTYPE_BYTES
from llmcompress.compress.scheme import Scheme, WeightGrid
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import (
    EXPERT,
    DeclaredGrid,
    Layout,
    Package,
    cast_exactly,
    integer_grid_refusal,
    nothing_compressed,
    take,
)
from llmcompress.formats.bitpack import WORD_BITS, WORD_BYTES, num_words, pack_words, unpack_words

if TYPE_CHECKING:
    import torch

    from llmcompress.checkpoint.safetensors import StoredTensor
    from llmcompress.compress.weight import CompressedWeight, QuantizedWeight


class CompressedTensors:
    """Integer grids of 2, 3, 4 and 8 bits, symmetric or not, in groups or rows."""

    name = "compressed_tensors"
    summary = "pack-quantized int2, int3, int4, int8, symmetric or not"
    readers: Mapping[str, str] = {"transformers + compressed-tensors": "tested", "vLLM": "by its source"}
    quant_method = "compressed-tensors"
    packages = (Package("compressed_tensors", "compressed-tensors"),)
    kernels = "read by the engine's own code, which unpacks to dense weights where it has no kernel"
    module_classes = frozenset({"Linear"})
    keeps_dtypes = False
    float16_scales = False
    marker = "weight_packed"
    groups: tuple[str, int] | None = ("weight_scale", 1)

    def is_default_for(self, scheme: Scheme) -> bool:
        """Every integer grid: one package beside transformers runs it."""
        return scheme.parts == {"weights"} and not scheme.grid.codebook

    def refuses(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Why the layout cannot hold such a linear, or None."""
        return integer_grid_refusal(scheme, in_features, self.name) or _unreadable(
            scheme.grid, out_features, in_features
        )

    def refuses_layout(self, layout: Layout) -> str | None:
        """Why no reader would see this mix as it is meant, or None. Symmetric schemes mix freely."""
        schemes = set(layout.schemes.values())
        if len(schemes) > 1 and not all(scheme.grid.symmetric for scheme in schemes):
            labels = " and ".join(sorted(scheme.label() for scheme in schemes))
            return (
                f"transformers cannot load asymmetric linears beside others ({labels}); "
                "choose symmetric schemes, or one asymmetric scheme for all"
            )
        return nothing_compressed(layout.schemes) or _experts(layout)

    def packed_bytes(self, scheme: Scheme, out_features: int, in_features: int, dtype: str) -> int:
        """Words of codes, scales in `dtype`, the shape, and words of zero points where the scheme has its own."""
        grid = scheme.grid
        groups = grid.num_groups(in_features)
        codes = num_words(in_features, grid.num_bits) * WORD_BYTES * out_features
        zeros = 0 if grid.symmetric else num_words(out_features, grid.num_bits) * WORD_BYTES * groups
        return codes + out_features * groups * DTYPE_BYTES[dtype] + zeros + 2 * DTYPE_BYTES["I64"]

    def pack(self, weight: CompressedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The packed codes, the scales in `dtype`, the shape and, where asymmetric, the packed zero points.

        Raises: LLMCompressError when a scale is not a value of `dtype`.
        """
        import torch

        from llmcompress.compress.weight import QuantizedWeight

        assert isinstance(weight, QuantizedWeight), "compressed_tensors holds codes"
        num_bits, zero = weight.grid.num_bits, weight.zero_point_OG
        assert zero is not None, "compressed_tensors holds integer grids"
        tensors = {
            "weight_packed": pack_words(weight.codes_OI, num_bits),
            "weight_scale": cast_exactly(weight.scale_OG, dtype, self.name),
            "weight_shape": torch.tensor(weight.codes_OI.shape, dtype=torch.int64),
        }
        if weight.grid.symmetric:
            assert bool((zero == 1 << (num_bits - 1)).all()), "a symmetric zero point lies at mid-range"
        else:
            tensors["weight_zero_point"] = pack_words(zero, num_bits, axis=0)
        return tensors

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: Scheme, out_features: int, in_features: int
    ) -> QuantizedWeight:
        """The weight that these tensors hold. Raises: LLMCompressError for a missing or misshapen tensor."""
        import torch

        from llmcompress.compress.weight import QuantizedWeight

        grid = scheme.grid
        num_bits, groups = grid.num_bits, grid.num_groups(in_features)
        packed = take(tensors, "weight_packed", torch.int32, (out_features, num_words(in_features, num_bits)))
        scale = take(tensors, "weight_scale", None, (out_features, groups))
        shape = take(tensors, "weight_shape", torch.int64, (2,)).tolist()
        if shape != [out_features, in_features]:
            raise LLMCompressError(f"tensor weight_shape says {shape}, expected {[out_features, in_features]}")
        if grid.symmetric:
            zero = torch.full((out_features, groups), 1 << (num_bits - 1), dtype=torch.uint8, device=packed.device)
        else:
            words = take(tensors, "weight_zero_point", torch.int32, (num_words(out_features, num_bits), groups))
            zero = unpack_words(words, num_bits, out_features, axis=0)
        codes = unpack_words(packed, num_bits, in_features)
        return QuantizedWeight(codes, scale.to(torch.float32, copy=True), zero, None, grid)

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The local names; zero points only where the scheme has its own."""
        names = ("weight_packed", "weight_scale", "weight_shape")
        return names if scheme.grid.symmetric else (*names, "weight_zero_point")

    def quantization_config(self, layout: Layout) -> dict[str, Any]:
        """The object of config.json: a config group per scheme, and the skipped linears by name."""
        static = layout.knobs.get("actorder") == "static"
        groups = {
            f"group_{index}": {"targets": targets, "weights": _arguments(scheme.grid, static)}
            for index, (scheme, targets) in enumerate(_targets(layout.schemes).items())
        }
        config: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(layout.skipped),
        }
        symmetric = all(scheme.grid.symmetric for scheme in layout.schemes.values())
        return config | {"dequantize": True} if layout.dense_on_loading or not symmetric else config

    def extra_files(self, layout: Layout) -> dict[str, str]:
        """None: engines read config.json."""
        return {}

    def declared(self, config: Mapping[str, Any]) -> list[DeclaredGrid]:
        """One grid per config group."""
        weights = [(group or {}).get("weights") or {} for group in (config.get("config_groups") or {}).values()]
        return [
            DeclaredGrid(
                declared.get("num_bits"),
                declared.get("group_size") or -1,
                declared.get("symmetric", True),
                declared.get("actorder"),
            )
            for declared in weights
        ]

    def packed_shape(self, marker: StoredTensor, grids: Sequence[DeclaredGrid]) -> tuple[int, int] | None:
        """From the words of codes; not where a word may be partly filled: the width is in a tensor then."""
        bits = grids[0].width if len(grids) == 1 else None
        if bits is None or len(marker.shape) != 2 or WORD_BITS % bits:
            return None
        return marker.shape[0], marker.shape[1] * WORD_BITS // bits


def _unreadable(grid: WeightGrid, out_features: int, in_features: int) -> str | None:
    """4-bit zero points in a single word per group, which compressed-tensors 0.20 fails to unpack."""
    if grid.num_bits == 4 and not grid.symmetric and out_features <= 8 and grid.num_groups(in_features) > 1:
        return (
            f"compressed-tensors cannot read 4-bit zero points of {out_features} out_features (it needs more than 8); "
            "ignore this linear or choose a symmetric scheme"
        )
    return None


def _experts(layout: Layout) -> str | None:
    """Experts of a mixture in a scheme that their readers cannot give them."""
    schemes = {scheme for name, scheme in layout.schemes.items() if "experts" in name}
    if not any(EXPERT.fullmatch(name) for name in layout.schemes):
        return None
    if any(not scheme.grid.symmetric for scheme in schemes):
        return "transformers and vLLM read no zero points of a mixture's experts; choose a symmetric scheme"
    if len(schemes) > 1:
        labels = " and ".join(sorted(scheme.label() for scheme in schemes))
        return f"transformers reads all experts, shared ones too, by one scheme, not {labels}; choose one"
    return None


def _arguments(grid: WeightGrid, static_actorder: bool) -> dict[str, Any]:
    """The engine's description of one grid. Static activation order leaves no trace in the file; its name is
    recorded for groups only, as readers refuse it for rows."""
    arguments: dict[str, Any] = {"num_bits": grid.num_bits, "type": "int", "symmetric": grid.symmetric}
    if grid.group_size == -1:
        return arguments | {"strategy": "channel"}
    arguments |= {"strategy": "group", "group_size": grid.group_size}
    return arguments | ({"actorder": "static"} if static_actorder else {})


def _targets(schemes: Mapping[str, Scheme]) -> dict[Scheme, list[str]]:
    """Which linears each scheme covers, in as few words as are exact.

    One scheme: the class name. Several: a pattern over the numbers in a path where all linears of that pattern agree,
    else the paths themselves.
    """
    if len(set(schemes.values())) == 1:
        return {next(iter(schemes.values())): ["Linear"]}
    by_pattern: dict[str, dict[str, Scheme]] = defaultdict(dict)
    for name, scheme in schemes.items():
        by_pattern[_pattern(name)][name] = scheme
    targets: dict[Scheme, list[str]] = defaultdict(list)
    for pattern, members in by_pattern.items():
        agreed = len(set(members.values())) == 1 and len(members) > 1
        for name, scheme in members.items():
            target = pattern if agreed else name
            if target not in targets[scheme]:
                targets[scheme].append(target)
    return dict(targets)


def _pattern(name: str) -> str:
    """The path with its numbers open, as the engine spells a regular expression.

    >>> _pattern("model.layers.0.mlp.up_proj")
    're:model\\\\.layers\\\\.\\\\d+\\\\.mlp\\\\.up_proj$'
    """
    parts = [r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")]
    return "re:" + r"\.".join(parts) + "$"


ENTRY = CompressedTensors()
