"""What a quantization would come to, from config.json and safetensors headers alone. Free of torch and transformers.

    headers ──> which tensors are linears of a decoder layer ──> bits a weight ──> bytes after
                     │                                       └─> Hessian, layer, linear ──> peak memory
                     └─> what is left alone, and why

The decoder layers are the numbered modules (`model.layers.3.`) that hold most of the parameters; their linears are the
two-dimensional tensors called `weight` below them. The run itself asks the model; here the names have to do.

Units: bytes, seconds, bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import StoredTensor
from llmcompress.compress.footprint import Footprint, footprint
from llmcompress.compress.scheme import WeightScheme
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.errors import LLMCompressError, raise_all

IMPORTS_BYTES = 600 << 20
"""Resident memory of Python with torch, transformers and the compiled loops, before any work."""
NUMBERED = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.(?P<local>.+)$")
HEADER_BYTES = 150  # of a packed tensor's entry in the file
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """One linear: module name, out_features, in_features, grid, bytes as stored and as packed."""

    name: str
    rows: int
    width: int
    scheme: WeightScheme
    before_bytes: int
    after_bytes: int


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What a run would take and give. `skipped`: tensor name -> why it stays; norms and biases are not named."""

    linears: tuple[LinearPlan, ...]
    skipped: dict[str, str]
    layers: int
    parameters: int
    before_bytes: int
    after_bytes: int
    bits_per_weight: float
    peak_memory_bytes: int
    disk_bytes: int
    seconds: float
    streaming: Footprint | None


def plan_quantization(
    checkpoint: Checkpoint, settings: QuantizeSettings, num_tokens: int, seq_len: int, flops_per_s: float
) -> QuantizePlan:
    """Sizes, memory and time of quantizing `checkpoint` with `settings` on `num_tokens` tokens of text.

    flops_per_s: what the machine does in matrix products. Raises: LLMCompressError, all problems together: no decoder
    layers, a group size that does not divide a width, fused experts, a pattern that matches nothing.
    """
    path, found = decoder_linears(checkpoint)
    scheme, problems = settings.weight_scheme(), []
    linears, skipped = [], {}
    for stored in found:
        name = stored.name.removesuffix(".weight")
        rows, width = stored.shape if checkpoint.config.get("model_type") != "gpt2" else stored.shape[::-1]
        override = next((one for one in settings.overrides if fnmatchcase(name, one.pattern)), None)
        grid = settings.override_scheme(override) if override else scheme
        if any(fnmatchcase(name, pattern) for pattern in settings.ignore):
            skipped[name] = "ignored on request"
        elif width % grid.group_width(width):
            problems.append((grid.group_width(width), width, name))
        else:
            after = packed_bytes(rows, width, grid, settings.formats()[0], stored.dtype)
            linears.append(LinearPlan(name, rows, width, grid, stored.num_bytes, after))
    raise_all(_group_problems(problems) + _pattern_problems(settings, found))
    if not linears:
        raise LLMCompressError(f"{checkpoint.name}: no linear is left to quantize")
    inside = {stored.name for stored in found}
    for stored in checkpoint.stored.values():
        if len(stored.shape) == 2 and stored.name not in inside:
            skipped[stored.name.removesuffix(".weight")] = "outside the decoder layers"
    return _totals(checkpoint, settings, path, linears, skipped, num_tokens, seq_len, flops_per_s)


def _totals(
    checkpoint: Checkpoint, settings: QuantizeSettings, path: str, linears: Sequence[LinearPlan],
    skipped: dict[str, str], num_tokens: int, seq_len: int, flops_per_s: float,
) -> QuantizePlan:  # fmt: skip
    before = sum(stored.num_bytes for stored in checkpoint.stored.values())
    after = before - sum(one.before_bytes for one in linears) + sum(one.after_bytes for one in linears)
    calibrated = settings.method != "rtn"
    streaming = None
    if calibrated:
        batch = max(settings.batch_tokens, seq_len)
        bound = settings.activation_memory_mb << 20
        widest = max(one.width for one in linears)
        streaming = footprint(num_tokens, min(batch, num_tokens), _hidden(checkpoint), widest, bound, settings.aims())
    needed = sum(flops(one, num_tokens if calibrated else 0) for one in linears)
    return QuantizePlan(
        tuple(linears),
        skipped,
        len({_numbered(one.name, path) for one in linears}),
        sum(prod(stored.shape) for stored in checkpoint.stored.values() if stored.dtype in FLOATS),
        before,
        after,
        8 * sum(one.after_bytes for one in linears) / sum(one.rows * one.width for one in linears),
        IMPORTS_BYTES + working_bytes(checkpoint, path, linears, streaming),
        after + sum(one.after_bytes for one in linears) + (streaming.disk_bytes if streaming else 0),
        needed / (0.35 * flops_per_s) + 3 * before / 300e6,
        streaming,
    )


def decoder_linears(checkpoint: Checkpoint) -> tuple[str, list[StoredTensor]]:
    """The path of the module list that holds most, and the two-dimensional weights below it.

    Raises: LLMCompressError when there is no such list, or it holds several matrices in one tensor.
    """
    if "quantization_config" in checkpoint.config:
        raise LLMCompressError(f"{checkpoint.name}: is quantized already", "start from the full-precision checkpoint")
    lists: dict[str, int] = {}
    for stored in checkpoint.stored.values():
        if match := NUMBERED.match(stored.name):
            lists[match["list"]] = lists.get(match["list"], 0) + prod(stored.shape)
    if not lists:
        raise LLMCompressError(f"{checkpoint.name}: no tensor is of a numbered decoder layer")
    path = max(lists, key=lambda name: (lists[name], -len(name)))
    inside = [stored for stored in checkpoint.stored.values() if _numbered(stored.name, path) is not None]
    fused = [one.name for one in inside if ".experts." in one.name or (len(one.shape) > 2 and "conv" not in one.name)]
    if fused:
        raise LLMCompressError(f"{checkpoint.name}: {fused[0]} is of a mixture of experts, which is not supported")
    return path, [one for one in inside if len(one.shape) == 2 and one.name.endswith(".weight")]


def _numbered(name: str, path: str) -> int | None:
    match = NUMBERED.match(name)
    return int(match["index"]) if match and match["list"] == path else None


def packed_bytes(rows: int, width: int, scheme: WeightScheme, layout: str, dtype: str) -> int:
    """Bytes of a linear's packed tensors in `layout`: codes, scales, and what the layout stores beside them."""
    groups = width // scheme.group_width(width)
    codes = -(-rows * width * scheme.num_bits // 8)
    if layout == "bitsandbytes":
        scales = rows * groups * (1 if scheme.double_quant else 4)
        nested = (-(-rows * groups // 256)) * 4 + 256 * 4 if scheme.double_quant else 0
        return codes + scales + nested + 16 * 4 + 110
    scale_bytes = rows * groups * 2
    if layout == "gptq":
        return codes + scale_bytes + groups * rows * scheme.num_bits // 8 + width * 4
    words = -(-width * scheme.num_bits // 32) * 4 * rows
    zeros = 0 if scheme.symmetric else -(-rows * scheme.num_bits // 32) * 4 * groups
    return words + scale_bytes * (2 if dtype == "F32" else 1) + zeros + 16


def working_bytes(checkpoint: Checkpoint, path: str, linears: Sequence[LinearPlan], streaming: Footprint | None) -> int:
    """Memory above the imports: at the most demanding linear, or where the embeddings are read.

    With text: two Hessians (one held out) and a factor, and the weight some six times in float32 while it is refined;
    without, six times the weight. A layer is read ahead, and the packed one before is not yet written.
    """
    outside = [one for one in checkpoint.stored.values() if _numbered(one.name, path) is None]
    embeddings = max((prod(one.shape) for one in outside), default=0)
    by_layer: dict[int, int] = {}
    for one in linears:
        index = _numbered(one.name, path) or 0
        by_layer[index] = by_layer.get(index, 0) + one.after_bytes
    solving = max(6 * 4 * one.rows * one.width + (3 * 4 * one.width**2 if streaming else 0) for one in linears)
    layer = max(by_layer.values())
    return max(solving + 4 * layer, 6 * embeddings if streaming else 0) + (streaming.memory_bytes if streaming else 0)


def flops(linear: LinearPlan, num_tokens: int) -> float:
    """The operations that a linear needs at least: forward, its share of a Hessian, factor and codes."""
    rows, width = linear.rows, linear.width
    if not num_tokens:
        return 60.0 * rows * width
    return 2.0 * rows * width * num_tokens + 0.6 * num_tokens * width**2 + width**3 / 5 + 12.0 * rows * width**2


def _hidden(checkpoint: Checkpoint) -> int:
    config: dict[str, Any] = checkpoint.config
    return int(config.get("hidden_size") or config.get("n_embd") or 0)


def _group_problems(problems: Iterable[tuple[int, int, str]]) -> list[LLMCompressError]:
    first: dict[tuple[int, int], list[str]] = {}
    for group, width, name in problems:
        first.setdefault((group, width), []).append(name)
    return [
        LLMCompressError(
            f"group size {group} does not divide the {width} in_features of {names[0]} and {len(names) - 1} more",
            "use another --group-size, or leave them out with --ignore",
        )
        for (group, width), names in first.items()
    ]


def _pattern_problems(settings: QuantizeSettings, found: Sequence[StoredTensor]) -> list[LLMCompressError]:
    names = [stored.name.removesuffix(".weight") for stored in found]
    return [
        LLMCompressError(f"ignore pattern {pattern!r} matches no linear", f"linears are called like {min(names)}")
        for pattern in settings.ignore
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
