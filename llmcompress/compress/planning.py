"""What a quantization would come to, from config.json and safetensors headers alone. Free of torch and transformers.

    headers ──> which tensors are linears of a decoder layer ──> bits a weight ──> bytes after
                     │                                       └─> Hessian, layer, linear ──> peak memory
                     └─> what is left alone, and why

The decoder layers are the numbered modules (`model.layers.3.`) that hold most of the parameters, towers of a wrapper
(`visual`, `vision_tower`, `audio_tower` …) and prediction heads (`mtp`) left out; their linears are the two-
dimensional tensors called `weight` below them, and the slices of those that hold a mixture's experts. Mask buffers,
convolutions and gates are none. The run itself asks the model; here the names have to do.

Units: bytes, seconds, bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import StoredTensor
from llmcompress.compress.footprint import Footprint, footprint
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.compress.targets import Linear, Target, choose
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import EXPERT, FORMATS, Format
from llmcompress.models.config import experts_per_token, hidden_size

IMPORTS_BYTES = 600 << 20
"""Resident memory of Python with torch, transformers and the compiled loops, before any work."""
NUMBERED = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.(?P<local>.+)$")
BESIDE = re.compile(r"(^|[._])(vision|visual|audio|image|vit|tower|mtp|multi_modal_projector|speech)")
"""Paths of what lies beside the language model."""
FLOATS = ("F64", "F32", "F16", "BF16")
FUSED = re.compile(
    r"(?P<block>.+?)(\.experts)?\.(?P<leaf>gate_up_proj|down_proj|input_linear\.weight|output_linear\.weight)"
)
"""A tensor that holds all experts of a layer, where it has three dimensions."""


@dataclass(frozen=True, slots=True)
class PlannedLinear(Target):
    """A linear to compress, with its bytes as stored and as packed."""

    before_bytes: int
    after_bytes: int


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What a run would take and give.

    linears: what is compressed, and how. skipped: linear -> why it stays; norms and biases are not named. experts: of a
    layer, 0 where the model is no mixture. active_parameters: those that a token goes through.
    """

    linears: tuple[PlannedLinear, ...]
    skipped: dict[str, str]
    layers: int
    experts: int
    parameters: int
    active_parameters: int
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
    layers, and whatever `targets.choose` refuses.
    """
    formats = [FORMATS.get(name, "quantize.format") for name in settings.formats()]
    found = header_linears(checkpoint)
    chosen = choose(found, settings, formats, checkpoint.name)
    stored = dict(checkpoint.stored) | fused_slices(checkpoint)
    linears = tuple(_planned(target, formats[0], stored[target.tensor].num_bytes) for target in chosen.targets)
    before, packed = (
        sum(tensor.num_bytes for tensor in checkpoint.stored.values()),
        sum(linear.after_bytes for linear in linears),
    )
    after = before - sum(linear.before_bytes for linear in linears) + packed
    method, _ = settings.solver()
    streaming = None
    parameters = sum(prod(tensor.shape) for tensor in checkpoint.stored.values() if tensor.dtype in FLOATS)
    num_experts, idle = _experts(checkpoint, found)
    if method.needs:
        batch = min(max(settings.batch_tokens, seq_len), num_tokens)
        widest = max(target.in_features for target in linears)
        bound = settings.activation_memory_mb << 20
        beside = settings.runs_original()
        streaming = footprint(num_tokens, batch, _hidden(checkpoint), widest, bound, beside, num_experts > 0)
    routed = (experts_per_token(checkpoint.config) or num_experts) / max(num_experts, 1)
    shares = {target.name: routed if EXPERT.fullmatch(target.name) else 1.0 for target in linears}
    needed = sum(flops(target, num_tokens * shares[target.name] if method.needs else 0) for target in linears)
    return QuantizePlan(
        linears,
        {linear.name: reason for linear, reason in chosen.skipped},
        len({target.layer for target in linears}),
        num_experts,
        parameters,
        parameters - idle,
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

    Raises: LLMCompressError when there are no numbered layers.
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
    for stored in (*checkpoint.stored.values(), *fused_slices(checkpoint).values()):
        match = NUMBERED.match(stored.name)
        layer = int(match["index"]) if match and match["list"] == path else None
        if len(stored.shape) == 2 and layer is not None and stored.name.endswith(".weight"):
            inside.append(_linear(stored, layer, NUMBERED.match(stored.name)["local"], module_class))  # type: ignore[index]
        elif len(stored.shape) == 2:
            outside.append(_linear(stored, None, stored.name, "Linear"))
    return inside + outside


def fused_slices(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The experts in tensors that hold all of a layer's, [E, O, I], by a name for each; see `models.experts.sliced`."""
    slices: dict[str, StoredTensor] = {}
    for stored in checkpoint.stored.values():
        match = FUSED.fullmatch(stored.name)
        if match is None or len(stored.shape) != 3:
            continue
        experts, rows, columns = stored.shape
        leaves = (
            ("gate_proj", "up_proj") if match["leaf"] in ("gate_up_proj", "input_linear.weight") else ("down_proj",)
        )
        for expert in range(experts):
            for leaf in leaves:
                name = f"{match['block']}.experts.{expert}.{leaf}.weight"
                size = stored.num_bytes // (experts * len(leaves))
                slices[name] = replace(stored, name=name, shape=(rows // len(leaves), columns), num_bytes=size)
    return slices


def _experts(checkpoint: Checkpoint, linears: Sequence[Linear]) -> tuple[int, int]:
    """Experts of a layer, the most of any, and the parameters in those that a token is not routed to."""
    blocks: dict[str, set[str]] = {}
    size = 0
    for linear in linears:
        if match := EXPERT.fullmatch(linear.name):
            blocks.setdefault(match["block"], set()).add(match["number"])
            size += linear.out_features * linear.in_features
    experts = max(map(len, blocks.values()), default=0)
    used = min(experts_per_token(checkpoint.config) or experts, experts)
    return experts, size - size * used // experts if experts else 0


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


def flops(linear: Linear, num_tokens: float) -> float:
    """The operations that a linear needs at least: forward, its share of a Hessian, factor and codes."""
    rows, width = linear.out_features, linear.in_features
    if not num_tokens:
        return 60.0 * rows * width
    return 2.0 * rows * width * num_tokens + 0.6 * num_tokens * width**2 + width**3 / 5 + 12.0 * rows * width**2


def _hidden(checkpoint: Checkpoint) -> int:
    return hidden_size(checkpoint.config) or 0
