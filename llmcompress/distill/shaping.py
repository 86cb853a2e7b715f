"""From what a user asks (`keep: 0.5`, `layers: [0, 2, 4]`, `keep_units: 0.5`) to the shape of a student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llmcompress.distill.cut import Selection, Shape, Widths, cut, find_widths, head_size, num_units
from llmcompress.distill.importance import contributions, largest
from llmcompress.distill.layer_map import evenly
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.models.blocks import decoder_layers

ROUND_TO = 64
"""Feed-forward widths are rounded down to a multiple of this where the teacher's is one, so that groups of a quantized
student come out even."""


def student_from(
    teacher: nn.Module, *, keep: float | None, layers: Sequence[int], keep_units: float | None,
    keep_heads: float | None, batches: Iterable[Mapping[str, torch.Tensor]],
) -> tuple[nn.Module, str]:  # fmt: skip
    """The student, and one line on what was kept.

    keep, keep_units, keep_heads: fractions in (0, 1]. layers: which ones, instead of `keep`. batches: calibration text
    as arguments of the model's forward, read only where the width is cut.

    Raises: LLMCompressError for layers that the teacher does not have, and as `cut`.
    """
    found = decoder_layers(teacher).layers
    config: Any = teacher.config
    kept = kept_layers(len(found), keep, layers)
    said = [f"layers {', '.join(map(str, kept))} of {len(found)}"]
    if keep_units is None and keep_heads is None:
        return cut(teacher, Shape(kept), None), said[0]
    widths = [find_widths(layer, config, keep_heads is not None) for layer in found]
    sizes = _contributions(teacher, widths, batches)
    units = _fewer_units(config, found[0], keep_units)
    heads = _fewer_heads(config, keep_heads)
    selections = {index: _select(index, widths[index], sizes, units, heads, config) for index in kept}
    said += [f"{units} of {num_units(config, found[0])} feed-forward units"] if units else []
    said += [f"{heads[0]} of {config.num_attention_heads} heads"] if heads else []
    shape = Shape(kept, units, heads[0] if heads else None, heads[1] if heads else None, selections)
    return cut(teacher, shape, widths[0]), f"{'; '.join(said)}, those that contribute most on the calibration text"


def kept_layers(num_layers: int, keep: float | None, layers: Sequence[int]) -> tuple[int, ...]:
    """Which of the teacher's layers stay, in order.

    Raises: LLMCompressError for a layer that there is not, one named twice, or layers out of order.

    >>> kept_layers(6, 0.5, ()), kept_layers(6, None, [0, 3]), kept_layers(3, None, ())
    ((0, 2, 5), (0, 3), (0, 1, 2))
    """
    if not layers:
        return evenly(max(1, round((1.0 if keep is None else keep) * num_layers)), num_layers)
    problems = [
        LLMCompressError(f"layers: {index} is out of range; the teacher has layers 0 to {num_layers - 1}")
        for index in layers
        if not 0 <= index < num_layers
    ]
    if sorted(set(layers)) != list(layers):
        problems.append(LLMCompressError(f"layers: {list(layers)} must be increasing, each layer once"))
    raise_all(problems)
    return tuple(layers)


def _contributions(
    teacher: nn.Module, widths: Sequence[Widths], batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    watched: dict[str, nn.Module] = {}
    for index, (layer, one) in enumerate(zip(decoder_layers(teacher).layers, widths, strict=True)):
        for local in (one.down, one.output):
            if local is not None:
                watched[f"{index}.{local}"] = layer.get_submodule(local)
    return contributions(teacher, watched, batches)


def _fewer_units(config: Any, layer: nn.Module, keep: float | None) -> int | None:
    if keep is None:
        return None
    whole = num_units(config, layer)
    step = ROUND_TO if whole % ROUND_TO == 0 and keep * whole >= ROUND_TO else 1
    return max(1, int(keep * whole) // step * step)


def _fewer_heads(config: Any, keep: float | None) -> tuple[int, int] | None:
    """(query heads, key-value heads) that stay."""
    if keep is None:
        return None
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    kept = max(1, round(keep * groups))
    return kept * (heads // groups), kept


def _select(
    index: int, widths: Widths, sizes: Mapping[str, torch.Tensor], units: int | None,
    heads: tuple[int, int] | None, config: Any,
) -> Selection:  # fmt: skip
    kept_units = largest(sizes[f"{index}.{widths.down}"], units) if units else None
    if heads is None:
        return Selection(kept_units)
    all_groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_group = config.num_attention_heads // all_groups * head_size(config)
    queries = largest(sizes[f"{index}.{widths.output}"], heads[1], per_group)
    groups = (queries.view(-1, per_group)[:, 0] // per_group)[:, None]
    size = head_size(config)
    keys = (groups * size + torch.arange(size)).reshape(-1)
    return Selection(kept_units, queries, keys)
