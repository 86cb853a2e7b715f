"""What a checkpoint says of itself: config.json and the headers of its files as a flat table of facts.

    config.json ─────────────┐
    safetensors headers ─────┼──> Facts: quant_method, bits, group_size, in_features {linear: width}, fused_mixed …
    quantize_config.json ────┘

No weight is read. The one exception are the few bytes of JSON in which bitsandbytes keeps a linear's shape, since its
packed tensor is flat. Rules (rules.py) look at these facts and at nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import StoredTensor

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears of one parent that engines fuse into one."""
NONE = "none"
PACKED = {
    "qweight": "gptq",
    "weight_packed": "compressed-tensors",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes",
}
"""What a packed linear's tensor ends in -> its layout."""
_ENCODER = re.compile(r"Model$|For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering)$")
"""Architectures that write no text, by transformers' naming."""
_WORD_BITS = 32
_COMPARED = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True, slots=True)
class Facts:
    """Fact name -> value. A list or mapping stands for several values that a rule asks one by one."""

    values: Mapping[str, Any]

    @property
    def quant_method(self) -> str:
        """The layout that config.json declares; `none` for plain weights."""
        return str(self.values["quant_method"])


def facts(checkpoint: Checkpoint) -> Facts:
    """The facts of a checkpoint."""
    declared = checkpoint.config.get("quantization_config") or {}
    schemes = _schemes(declared)
    packed = _packed(checkpoint.stored)
    shapes = {
        linear: shape for linear, suffix in packed.items() if (shape := _shape(checkpoint, linear, suffix, schemes))
    }
    plain = {name.removesuffix(".weight") for name in checkpoint.stored if name.endswith(".weight")}
    dense = {name for name in plain - packed.keys() if len(checkpoint.stored[f"{name}.weight"].shape) == 2}
    tied = checkpoint.config.get("tie_word_embeddings") is True
    return Facts(
        _declared_facts(declared, schemes, checkpoint.folder)
        | {
            "decoder": not any(_ENCODER.search(str(one)) for one in checkpoint.config.get("architectures") or []),
            "packed": sorted(packed),
            "doubled": sorted(name for name, suffix in packed.items() if name in plain and suffix[:7] != "weight."),
            "in_features": {linear: shape[1] for linear, shape in shapes.items()},
            "out_features": {linear: shape[0] for linear, shape in shapes.items()},
            "ragged": _ragged(shapes, schemes),
            "groups_differ": _groups_differ(checkpoint.stored, shapes, schemes),
            "missing_g_idx": sorted(name for name in packed if f"{name}.g_idx" not in checkpoint.stored),
            "fused_mixed": _fused_mixed(packed, dense),
            "experts_mixed": _experts_mixed(packed, dense),
            "tied": tied,
            "tied_head_stored": [name for name in checkpoint.stored if tied and name.startswith("lm_head.")],
        }
    )


def _schemes(declared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The grids that a quantization_config declares, in one spelling whatever its layout."""
    if declared.get("quant_method") == "compressed-tensors":
        groups = declared.get("config_groups") or {}
        weights = [(group or {}).get("weights") or {} for group in groups.values()]
        return [
            {
                "bits": one.get("num_bits"),
                "group_size": one.get("group_size") or -1,
                "sym": one.get("symmetric", True),
                "actorder": one.get("actorder"),
            }
            for one in weights
        ]
    keys = ("bits", "group_size", "sym")
    return [{key: declared[key] for key in keys if key in declared}] if "bits" in declared else []


def _declared_facts(declared: Mapping[str, Any], schemes: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    damp = declared.get("damp_percent")
    return {
        "quant_method": declared.get("quant_method") or NONE if declared else NONE,
        "keys": sorted(declared),
        "checkpoint_format": declared.get("checkpoint_format"),
        "format": declared.get("format"),
        "bits": [one.get("bits") for one in schemes],
        "sym": [one.get("sym") for one in schemes],
        "bits_sym": {f"{bits} bits, sym {sym}": [bits, sym] for bits, sym in _pairs(schemes)},
        "group_size": [one.get("group_size") for one in schemes],
        "actorder": [one.get("actorder") for one in schemes],
        "desc_act": bool(declared.get("desc_act")),
        "lm_head": declared.get("lm_head"),
        "dynamic": bool(declared.get("dynamic")),
        "damp_in_range": damp is None or 0 < damp < 1,
        "config_differs": _config_differs(declared, folder),
    }


def _pairs(schemes: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(one.get("bits"), one.get("sym")) for one in schemes]


def _config_differs(declared: Mapping[str, Any], folder: Path) -> list[str]:
    """The keys in which quantize_config.json, where there is one, says something else than config.json."""
    beside = folder / "quantize_config.json"
    if declared.get("quant_method") != "gptq" or not beside.is_file():
        return []
    try:
        other = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        return ["it is not JSON"]
    return [key for key in _COMPARED if key in other and other[key] != declared.get(key)]


def _packed(stored: Iterable[str]) -> dict[str, str]:
    """Packed linear -> the suffix of the tensor that holds its codes (or, for bitsandbytes, its shape)."""
    found = {}
    for name in stored:
        for suffix in PACKED:
            if name.endswith(f".{suffix}"):
                found[name.removesuffix(f".{suffix}")] = suffix
    return found


def _shape(checkpoint: Checkpoint, linear: str, suffix: str, schemes: list[dict[str, Any]]) -> tuple[int, int] | None:
    """out_features and in_features of a packed linear, or None where the header does not tell."""
    tensor = checkpoint.stored[f"{linear}.{suffix}"]
    if suffix.startswith("weight.quant_state"):
        return _bitsandbytes_shape(tensor)
    bits = schemes[0].get("bits") if len(schemes) == 1 else None
    if len(tensor.shape) != 2 or not isinstance(bits, int) or bits < 1:
        return None
    if suffix == "qweight":
        return tensor.shape[1], tensor.shape[0] * _WORD_BITS // bits
    if _WORD_BITS % bits:
        return None  # words that are not filled: the width is in weight_shape, which is no header
    return tensor.shape[0], tensor.shape[1] * _WORD_BITS // bits


def _bitsandbytes_shape(tensor: StoredTensor) -> tuple[int, int] | None:
    try:
        shape = json.loads(b"".join(tensor.chunks()))["shape"]
        return int(shape[0]), int(shape[1])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _group_size(schemes: list[dict[str, Any]]) -> int | None:
    size = schemes[0].get("group_size") if len(schemes) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


def _ragged(shapes: Mapping[str, tuple[int, int]], schemes: list[dict[str, Any]]) -> list[str]:
    size = _group_size(schemes)
    return [f"{name} ({width} inputs)" for name, (_, width) in shapes.items() if size and width % size]


def _groups_differ(
    stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, int]], schemes: list[dict[str, Any]]
) -> list[str]:
    """Linears whose scales are not as many as the declared group size makes."""
    size = _group_size(schemes)
    wrong = []
    for name, (_, width) in shapes.items():
        for suffix, axis in (("scales", 0), ("weight_scale", 1)):
            scale = stored.get(f"{name}.{suffix}")
            if scale is not None and size and len(scale.shape) == 2 and scale.shape[axis] != -(-width // size):
                wrong.append(f"{name} ({scale.shape[axis]} groups for {width} inputs)")
    return wrong


def _fused_mixed(packed: Mapping[str, str], dense: Iterable[str]) -> list[str]:
    found = []
    for name in sorted(dense):
        parent, _, leaf = name.rpartition(".")
        siblings = next((group for group in FUSED if leaf in group), ())
        found += [f"{name} beside {parent}.{one}" for one in siblings if f"{parent}.{one}" in packed][:1]
    return found


def _experts_mixed(packed: Mapping[str, str], dense: Iterable[str]) -> list[str]:
    """Experts that are plain while others of their layer are packed."""
    expert = re.compile(r"(.*\.experts)\.\d+\.")
    layers = {match[1] for name in packed if (match := expert.match(name))}
    return sorted(name for name in dense if (match := expert.match(name)) and match[1] in layers)
