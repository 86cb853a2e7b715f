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
from collections.abc import Mapping
from typing import Any

import torch

from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.weight import QuantizedWeight
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import Layout
from llmcompress.formats.bitpack import num_words, pack_words, unpack_words
from llmcompress.formats.checks import cast_exactly, group_refusal, nothing_quantized, take


class CompressedTensors:
    """Integer grids of 2, 3, 4 and 8 bits, symmetric or not, in groups or rows."""

    name = "compressed_tensors"
    summary = "pack-quantized int2, int3, int4, int8, symmetric or not"
    readers: Mapping[str, str] = {"transformers + compressed-tensors": "tested", "vLLM": "by its source"}

    def refuses(self, scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
        """Why the layout cannot hold such a linear, or None."""
        if scheme.codebook:
            return f"compressed_tensors holds integer grids, not {scheme.codebook}; write bitsandbytes"
        return group_refusal(scheme, in_features) or _unreadable(scheme, out_features, in_features)

    def refuses_layout(self, layout: Layout) -> str | None:
        """Why no reader would see this mix as it is meant, or None. Symmetric schemes mix freely."""
        schemes = set(layout.schemes.values())
        if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
            labels = " and ".join(sorted(scheme.label() for scheme in schemes))
            return (
                f"transformers cannot load asymmetric linears beside others ({labels}); "
                "choose symmetric schemes, or one asymmetric scheme for all"
            )
        return nothing_quantized(layout.schemes)

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The packed codes, the scales in `dtype`, the shape and, where asymmetric, the packed zero points.

        Raises: LLMCompressError when a scale is not a value of `dtype`.
        """
        num_bits, zero = weight.scheme.num_bits, weight.zero_point_OG
        assert zero is not None, "compressed_tensors holds integer grids"
        tensors = {
            "weight_packed": pack_words(weight.codes_OI, num_bits),
            "weight_scale": cast_exactly(weight.scale_OG, dtype, self.name),
            "weight_shape": torch.tensor(weight.codes_OI.shape, dtype=torch.int64),
        }
        if weight.scheme.symmetric:
            assert bool((zero == 1 << (num_bits - 1)).all()), "a symmetric zero point lies at mid-range"
        else:
            tensors["weight_zero_point"] = pack_words(zero, num_bits, axis=0)
        return tensors

    def unpack(
        self, tensors: Mapping[str, torch.Tensor], scheme: WeightScheme, out_features: int, in_features: int
    ) -> QuantizedWeight:
        """The weight that these tensors hold. Raises: LLMCompressError for a missing or misshapen tensor."""
        num_bits, groups = scheme.num_bits, scheme.num_groups(in_features)
        packed = take(tensors, "weight_packed", torch.int32, (out_features, num_words(in_features, num_bits)))
        scale = take(tensors, "weight_scale", None, (out_features, groups))
        shape = take(tensors, "weight_shape", torch.int64, (2,)).tolist()
        if shape != [out_features, in_features]:
            raise LLMCompressError(f"tensor weight_shape says {shape}, expected {[out_features, in_features]}")
        if scheme.symmetric:
            zero = torch.full((out_features, groups), 1 << (num_bits - 1), dtype=torch.uint8, device=packed.device)
        else:
            words = take(tensors, "weight_zero_point", torch.int32, (num_words(out_features, num_bits), groups))
            zero = unpack_words(words, num_bits, out_features, axis=0)
        codes = unpack_words(packed, num_bits, in_features)
        return QuantizedWeight(codes, scale.to(torch.float32, copy=True), zero, None, scheme)

    def suffixes(self, scheme: WeightScheme) -> tuple[str, ...]:
        """The local names; zero points only where the scheme has its own."""
        names = ("weight_packed", "weight_scale", "weight_shape")
        return names if scheme.symmetric else (*names, "weight_zero_point")

    def quantization_config(self, layout: Layout) -> dict[str, Any]:
        """The object of config.json: a config group per scheme, and the skipped linears by name."""
        groups = {
            f"group_{index}": {"targets": targets, "weights": _arguments(scheme, layout.actorder)}
            for index, (scheme, targets) in enumerate(_targets(layout.schemes).items())
        }
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(layout.skipped),
        }
        symmetric = all(scheme.symmetric for scheme in layout.schemes.values())
        return config if symmetric else config | {"dequantize": True}

    def extra_files(self, layout: Layout) -> dict[str, str]:
        """None: engines read config.json."""
        return {}


def _unreadable(scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
    """4-bit zero points in a single word per group, which compressed-tensors 0.20 fails to unpack."""
    if scheme.num_bits == 4 and not scheme.symmetric and out_features <= 8 and scheme.num_groups(in_features) > 1:
        return (
            f"compressed-tensors cannot read 4-bit zero points of {out_features} out_features (it needs more than 8); "
            "ignore this linear or choose a symmetric scheme"
        )
    return None


def _arguments(scheme: WeightScheme, actorder: str) -> dict[str, Any]:
    """The engine's description of one scheme. Static activation order leaves no trace in the file; its name is
    recorded for groups only, as readers refuse it for rows."""
    arguments: dict[str, Any] = {"num_bits": scheme.num_bits, "type": "int", "symmetric": scheme.symmetric}
    if scheme.group_size == -1:
        return arguments | {"strategy": "channel"}
    arguments |= {"strategy": "group", "group_size": scheme.group_size}
    return arguments | ({"actorder": "static"} if actorder == "static" else {})


def _targets(schemes: Mapping[str, WeightScheme]) -> dict[WeightScheme, list[str]]:
    """Which linears each scheme covers, in as few words as are exact.

    One scheme: the class name. Several: a pattern over the numbers in a path where all linears of that pattern agree,
    else the paths themselves.
    """
    if len(set(schemes.values())) == 1:
        return {next(iter(schemes.values())): ["Linear"]}
    by_pattern: dict[str, dict[str, WeightScheme]] = defaultdict(dict)
    for name, scheme in schemes.items():
        by_pattern[_pattern(name)][name] = scheme
    targets: dict[WeightScheme, list[str]] = defaultdict(list)
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
