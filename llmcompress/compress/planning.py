"""What a quantization would come to, from config.json and safetensors headers alone. Free of torch and transformers.

    headers ──> which tensors are linears of a decoder layer ──> bits a weight ──> bytes after
                     │                                       └─> Hessian, layer, linear ──> peak memory
                     └─> what is left alone, and why

The decoder layers are the numbered modules (`model.layers.3.`) that hold most of the parameters, towers of a wrapper
(`visual`, `vision_tower`, `audio_tower` …) and prediction heads (`mtp`) left out; their linears are the two-dimensional
tensors called `weight` below them. Mask buffers, convolutions and gates are none. The run itself asks the model; here
the names have to do.

Units: bytes, seconds, bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import StoredTensor
from llmcompress.compress.footprint import Footprint, footprint
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.compress.targets import Linear, Target, choose
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import FORMATS, Format
from llmcompress.models.config import hidden_size

IMPORTS_BYTES = 600 << 20
"""Resident memory of Python with torch, transformers and the compiled loops, before any work."""
NUMBERED = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.(?P<local>.+)$")
BESIDE = re.compile(r"(^|[._])(vision|visual|audio|image|vit|tower|mtp|multi_modal_projector|speech)")
"""Paths of what lies beside the language model."""
EXPERTS = re.compile(r"\.experts?\.|\.(block_sparse_)?moe\.")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class PlannedLinear(Target):
    """A linear to compress, with its bytes as stored and as packed."""

    before_bytes: int
    after_bytes: int


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What a run would take and give.

    linears: what is compressed, and how. skipped: linear -> why it stays; norms and biases are not named.
    """

    linears: tuple[PlannedLinear, ...]
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
    layers, fused experts, and whatever `targets.choose` refuses.
    """
    formats = [FORMATS.get(name, "quantize.format") for name in settings.formats()]
    chosen = choose(header_linears(checkpoint), settings, formats, checkpoint.name)
    stored = checkpoint.stored
    linears = tuple(_planned(target, formats[0], stored[target.tensor].num_bytes) for target in chosen.targets)
    before, packed = sum(tensor.num_bytes for tensor in stored.values()), sum(linear.after_bytes for linear in linears)
    after = before - sum(linear.before_bytes for linear in linears) + packed
    method, _ = settings.solver()
    streaming = None
    if method.needs:
        batch = min(max(settings.batch_tokens, seq_len), num_tokens)
        widest = max(target.in_features for target in linears)
        bound = settings.activation_memory_mb << 20
        streaming = footprint(num_tokens, batch, _hidden(checkpoint), widest, bound, settings.runs_original())
    needed = sum(flops(target, num_tokens if method.needs else 0) for target in linears)
    return QuantizePlan(
        linears,
        {linear.name: reason for linear, reason in chosen.skipped},
        len({target.layer for target in linears}),
        sum(prod(tensor.shape) for tensor in stored.values() if tensor.dtype in FLOATS),
        before,
        after,
        8 * packed / sum(target.out_features * target.in_features for target in linears),
        IMPORTS_BYTES + working_bytes(checkpoint, linears, streaming),
        after + packed + (streaming.disk_bytes if streaming else 0),
        needed / (0.35 * flops_per_s) + 3 * before / 300e6,
        streaming,
    )


def header_linears(checkpoint: Checkpoint) -> list[Linear]:
    """The linears that the headers speak of, those of the decoder layers first: two-dimensional tensors named `weight`.

    Raises: LLMCompressError when there are no numbered layers, or one is of a mixture of experts.
    """
    if "quantization_config" in checkpoint.config:
        raise LLMCompressError(f"{checkpoint.name}: is quantized already", "start from the full-precision checkpoint")
    lists: dict[str, int] = {}
    for stored in checkpoint.stored.values():
        if (match := NUMBERED.match(stored.name)) and stored.dtype in FLOATS and not BESIDE.search(match["list"]):
            lists[match["list"]] = lists.get(match["list"], 0) + prod(stored.shape)
    if not lists:
        raise LLMCompressError(f"{checkpoint.name}: no tensor is of a numbered decoder layer")
    path = max(lists, key=lambda name: (lists[name], -len(name)))
    module_class = "Conv1D" if checkpoint.config.get("model_type") in ("gpt2", "openai-gpt") else "Linear"
    inside, outside = [], []
    for stored in checkpoint.stored.values():
        match = NUMBERED.match(stored.name)
        layer = int(match["index"]) if match and match["list"] == path else None
        if layer is not None and EXPERTS.search(stored.name):
            raise LLMCompressError(
                f"{checkpoint.name}: {stored.name} is of a mixture of experts, which is not supported"
            )
        if len(stored.shape) == 2 and layer is not None and stored.name.endswith(".weight"):
            inside.append(_linear(stored, layer, NUMBERED.match(stored.name)["local"], module_class))  # type: ignore[index]
        elif len(stored.shape) == 2:
            outside.append(_linear(stored, None, stored.name, "Linear"))
    return inside + outside


def _linear(stored: StoredTensor, layer: int | None, local: str, module_class: str) -> Linear:
    rows, columns = stored.shape if module_class == "Linear" else stored.shape[::-1]
    name = stored.name.removesuffix(".weight")
    return Linear(name, stored.name, layer, local.removesuffix(".weight"), rows, columns, module_class, stored.dtype)


def _planned(target: Target, format: Format, before_bytes: int) -> PlannedLinear:
    after_bytes = format.packed_bytes(target.scheme, target.out_features, target.in_features, target.dtype)
    own: dict[str, Any] = {field.name: getattr(target, field.name) for field in fields(target)}
    return PlannedLinear(**own, before_bytes=before_bytes, after_bytes=after_bytes)


def working_bytes(checkpoint: Checkpoint, linears: Sequence[PlannedLinear], streaming: Footprint | None) -> int:
    """Memory above the imports: at the most demanding linear, or where the embeddings are read.

    With text: two Hessians (one held out) and a factor, and the weight some six times in float32 while it is refined;
    without, six times the weight. A layer is read ahead, and the packed one before is not yet written.
    """
    prefix = linears[0].name.removesuffix(f".{linears[0].layer}.{linears[0].local}")
    outside = [stored for stored in checkpoint.stored.values() if not stored.name.startswith(f"{prefix}.")]
    embeddings = max((prod(stored.shape) for stored in outside), default=0)
    by_layer: dict[int | None, int] = {}
    for target in linears:
        by_layer[target.layer] = by_layer.get(target.layer, 0) + target.after_bytes
    solving = max(
        6 * 4 * target.out_features * target.in_features + (3 * 4 * target.in_features**2 if streaming else 0)
        for target in linears
    )
    layer = max(by_layer.values())
    return max(solving + 4 * layer, 6 * embeddings if streaming else 0) + (streaming.memory_bytes if streaming else 0)


def flops(linear: Linear, num_tokens: int) -> float:
    """The operations that a linear needs at least: forward, its share of a Hessian, factor and codes."""
    rows, width = linear.out_features, linear.in_features
    if not num_tokens:
        return 60.0 * rows * width
    return 2.0 * rows * width * num_tokens + 0.6 * num_tokens * width**2 + width**3 / 5 + 12.0 * rows * width**2


def _hidden(checkpoint: Checkpoint) -> int:
    return hidden_size(checkpoint.config) or 0
