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
from llmcompress.checkpoint.tensors import StoredTensor
from llmcompress.formats.base import FORMATS, DeclaredGrid, Format, by_quant_method, declared_grids

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears of one parent that engines fuse into one."""
NONE = "none"
_ENCODER = re.compile(r"Model$|For(MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering)$")
"""Architectures that write no text, by transformers' naming."""
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
    layout = by_quant_method(str(declared.get("quant_method")))
    grids = layout.declared(declared) if layout else declared_grids(declared)
    packed = _packed(checkpoint.stored)
    shapes = {
        linear: shape
        for linear, format in packed.items()
        if (shape := format.packed_shape(checkpoint.stored[f"{linear}.{format.marker}"], grids))
    }
    plain = {name.removesuffix(".weight") for name in checkpoint.stored if name.endswith(".weight")}
    dense = {name for name in plain - packed.keys() if len(checkpoint.stored[f"{name}.weight"].shape) == 2}
    tied = checkpoint.config.get("tie_word_embeddings") is True
    return Facts(
        _declared_facts(declared, grids, checkpoint.folder)
        | {
            "decoder": not any(_ENCODER.search(str(one)) for one in checkpoint.config.get("architectures") or []),
            "packed": sorted(packed),
            "doubled": sorted(
                name for name, format in packed.items() if name in plain and not format.marker.startswith("weight.")
            ),
            "in_features": {linear: shape[1] for linear, shape in shapes.items()},
            "out_features": {linear: shape[0] for linear, shape in shapes.items()},
            "ragged": _ragged(shapes, grids),
            "groups_differ": _groups_differ(checkpoint.stored, packed, shapes, grids),
            "missing_g_idx": sorted(name for name in packed if f"{name}.g_idx" not in checkpoint.stored),
            "fused_mixed": _fused_mixed(packed, dense),
            "experts_mixed": _experts_mixed(packed, dense),
            "tied": tied,
            "tied_head_stored": [name for name in checkpoint.stored if tied and name.startswith("lm_head.")],
        }
    )


def _declared_facts(declared: Mapping[str, Any], grids: list[DeclaredGrid], folder: Path) -> dict[str, Any]:
    damp = declared.get("damp_percent")
    return {
        "quant_method": declared.get("quant_method") or NONE if declared else NONE,
        "keys": sorted(declared),
        "checkpoint_format": declared.get("checkpoint_format"),
        "format": declared.get("format"),
        "bits": [grid.num_bits for grid in grids],
        "sym": [grid.symmetric for grid in grids],
        "bits_sym": {f"{grid.num_bits} bits, sym {grid.symmetric}": [grid.num_bits, grid.symmetric] for grid in grids},
        "group_size": [grid.group_size for grid in grids],
        "actorder": [grid.actorder for grid in grids],
        "desc_act": bool(declared.get("desc_act")),
        "lm_head": declared.get("lm_head"),
        "dynamic": bool(declared.get("dynamic")),
        "damp_in_range": damp is None or 0 < damp < 1,
        "config_differs": _config_differs(declared, folder),
    }


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


def _packed(stored: Iterable[str]) -> dict[str, Format]:
    """Packed linear -> the layout whose marker it has."""
    return {
        name.removesuffix(f".{format.marker}"): format
        for name in stored
        for format in FORMATS
        if name.endswith(f".{format.marker}")
    }


def _group_size(grids: list[DeclaredGrid]) -> int | None:
    size = grids[0].group_size if len(grids) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


def _ragged(shapes: Mapping[str, tuple[int, int]], grids: list[DeclaredGrid]) -> list[str]:
    size = _group_size(grids)
    return [f"{name} ({width} inputs)" for name, (_, width) in shapes.items() if size and width % size]


def _groups_differ(
    stored: Mapping[str, StoredTensor], packed: Mapping[str, Format], shapes: Mapping[str, tuple[int, int]],
    grids: list[DeclaredGrid],
) -> list[str]:  # fmt: skip
    """Linears whose scales are not as many as the declared group size makes."""
    size = _group_size(grids)
    wrong = []
    for name, (_, width) in shapes.items():
        suffix, axis = packed[name].groups or ("", 0)
        scale = stored.get(f"{name}.{suffix}")
        if scale is not None and size and len(scale.shape) == 2 and scale.shape[axis] != -(-width // size):
            wrong.append(f"{name} ({scale.shape[axis]} groups for {width} inputs)")
    return wrong


def _fused_mixed(packed: Mapping[str, Format], dense: Iterable[str]) -> list[str]:
    found = []
    for name in sorted(dense):
        parent, _, leaf = name.rpartition(".")
        siblings = next((group for group in FUSED if leaf in group), ())
        found += [f"{name} beside {parent}.{one}" for one in siblings if f"{parent}.{one}" in packed][:1]
    return found


def _experts_mixed(packed: Mapping[str, Format], dense: Iterable[str]) -> list[str]:
    """Experts that are plain while others of their layer are packed."""
    expert = re.compile(r"(.*\.experts)\.\d+\.")
    layers = {match[1] for name in packed if (match := expert.match(name))}
    return sorted(name for name in dense if (match := expert.match(name)) and match[1] in layers)
