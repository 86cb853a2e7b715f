"""Architectures that llama.cpp knows, as far as they are known here: names, fields and how tensors change on the way.

transformers stores q and k of a Llama so that rotary embeddings turn halves of a head; llama.cpp turns neighbours, so
their rows are interleaved:

    rows of a head   0 1 2 3 | 4 5 6 7   ->   0 4 1 5 2 6 3 7        codes, scales and biases alike

A row of codes stays whole, so this costs nothing in quality. Gemma's norms are stored less one, and written plus one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmcompress.errors import LLMCompressError, unknown

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True, slots=True)
class Family:
    """arch: llama.cpp's name. permutes: whether rows of q and k are interleaved. norm_offset: added to norm weights."""

    arch: str
    permutes: bool = False
    norm_offset: float = 0.0


FAMILIES = {
    "llama": Family("llama", permutes=True),
    "mistral": Family("llama", permutes=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", norm_offset=1.0),
    "gemma3_text": Family("gemma3", norm_offset=1.0),
    "granite": Family("granite", permutes=True),
    "olmo2": Family("olmo2"),
}
"""model_type of config.json -> family."""


def family_of(config: Any, name: str) -> Family:
    """The family of a transformers config.

    Raises: LLMCompressError for one that is not known, or whose config has something that its fields do not hold.
    """
    model_type = str(config.model_type)
    if model_type not in FAMILIES:
        error = unknown("GGUF family", model_type, FAMILIES, name)
        error.hint = "serve its safetensors output by transformers or vLLM instead"
        raise error
    if model_type in ("llama", "mistral", "qwen2") and getattr(config, "mlp_bias", False):
        raise LLMCompressError(f"{name}: mlp_bias is true, which llama.cpp's {FAMILIES[model_type].arch} does not have")
    return FAMILIES[model_type]


def interleaved(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's rotary embedding pairs them; dimension 0 is heads x head size."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def add_fields(writer: GGUFWriter, config: Any) -> dict[str, torch.Tensor]:
    """Write the fields of the architecture; returns further tensors that it needs (rope_freqs.weight).

    Raises: LLMCompressError for a rope scaling that llama.cpp has no field for.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    return _add_rope(writer, config, head_dim)


def _add_rope(writer: GGUFWriter, config: Any, head_dim: int) -> dict[str, torch.Tensor]:
    declared = getattr(config, "rope_parameters", None) or {}
    rope = declared.get("full_attention", declared)
    base = float(rope.get("rope_theta") or getattr(config, "rope_theta", 10_000.0))
    writer.add_rope_freq_base(base)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, base, head_dim)}
    from gguf import RopeScalingType

    kinds = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
    if kind not in kinds:
        raise LLMCompressError(
            f"rope_type {kind!r}: GGUF export knows default, linear, yarn and llama3",
            "serve the safetensors output by transformers or vLLM instead",
        )
    writer.add_rope_scaling_type(kinds[kind])
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    return {}


def _llama3_factors(rope: dict[str, Any], base: float, head_dim: int) -> torch.Tensor:
    """What each rotary frequency is divided by (Llama 3.1's scaling), float32 [head_dim / 2].

    Wavelengths up to a part of the original context stay, those beyond another part are stretched by `factor`, and in
    between the inverse goes over linearly, as in transformers' own `rope_type: llama3`.
    """
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (index / head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)
