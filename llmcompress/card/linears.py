"""Linears in words: which kind one is, in which layer, and many of them in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from llmcompress.report import LinearRow

_NUMBERED = re.compile(r"(?P<above>.*?)\.(?P<layer>\d+)\.(?P<local>.+)")


def layer_of(name: str) -> int | None:
    """The decoder layer that a linear lies in, or None for one outside of them."""
    found = _NUMBERED.fullmatch(name)
    return int(found["layer"]) if found else None


def kind_of(name: str) -> str:
    """What a linear is called in every layer, experts taken together.

    >>> kind_of("model.layers.3.mlp.experts.11.w1"), kind_of("lm_head")
    ('mlp.experts.*.w1', 'lm_head')
    """
    found = _NUMBERED.fullmatch(name)
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", found["local"]) if found else name


def across_layers(name: str) -> str:
    """The name with its layer left open.

    >>> across_layers("model.layers.3.mlp.down_proj")
    'model.layers.*.mlp.down_proj'
    """
    found = _NUMBERED.fullmatch(name)
    return f"{found['above']}.*.{found['local']}" if found else name


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers, runs of them drawn together.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    ordered = sorted(set(numbers))
    breaks = [index + 1 for index, (a, b) in enumerate(pairwise(ordered)) if b != a + 1]
    runs = [ordered[start:end] for start, end in pairwise([0, *breaks, len(ordered)])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if run)


def worst_errors(rows: Iterable[LinearRow], error_kind: str) -> dict[str, dict[int, float]]:
    """Kind -> layer -> the largest relative error of that kind there; errors of zero and other kinds left out."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        layer = layer_of(row.name)
        if layer is None or row.error_kind != error_kind or not row.relative_error:
            continue
        layers = found.setdefault(kind_of(row.name), {})
        layers[layer] = max(layers.get(layer, 0.0), row.relative_error)
    return found
