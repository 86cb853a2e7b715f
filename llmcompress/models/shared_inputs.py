"""Which linears of a layer read the very same tensor, found by running the layer without numbers.

q, k and v read one normed state, gate and up another; a layer whose attention and MLP run side by side may read one in
all of them. Such linears have one Hessian and one factor, and are solved together. The layer's own `forward` says which
they are: it is run on the meta device, where tensors have shapes and no values, before its weights are read:

    layer on meta:   ln ──> x ──> q (x)   k (x)   v (x) ──> ... ──> o (y) ──> ...      [[q, k, v], [o], [gate, up], …]

No numbers, no time, no memory, and no table of architectures.

Shapes: B rows of a batch, S sequence length, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmcompress.models.stream import Calls

NO_SHAPES_ALONE = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""What a layer raises that looks at values: on the meta device there are none."""


def shared_inputs(layer: nn.Module, index: int, call: Calls, targets: Sequence[str]) -> list[list[str]]:
    """The targets in groups that read one tensor, in the order in which they are reached.

    layer: its parameters on the meta device. A layer that cannot be run without values (routing by value) has every
    target in a group of its own; so has a target that is not reached. That costs time and changes no result.
    """
    seen: dict[int, list[str]] = {}
    kept: list[torch.Tensor] = []  # alive, so that an id stands for one tensor

    def note(name: str, inputs: torch.Tensor) -> None:
        kept.append(inputs)
        seen.setdefault(id(inputs), []).append(name)

    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: note(name, args[0]))
        for name in targets
    ]
    buffers = [(module, dict(module._buffers)) for module in layer.modules()]
    args, kwargs = call.arguments[index]
    hidden_BSH = torch.empty(call.shape, dtype=torch.float32, device="meta")
    try:
        for module, values in buffers:
            module._buffers.update({name: _meta(value) for name, value in values.items()})
        layer(hidden_BSH, *_meta(args), **_meta(kwargs))
    except NO_SHAPES_ALONE:
        seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
        for module, values in buffers:
            module._buffers.update(values)
    groups = [list(dict.fromkeys(names)) for names in seen.values()]
    called = [name for names in groups for name in names]
    groups = groups if len(called) == len(set(called)) else []  # a linear that is called twice is left by itself
    reached = {name for names in groups for name in names}
    return groups + [[name] for name in targets if name not in reached]


def _meta(value: Any) -> Any:
    """Every tensor inside `value` as one on the meta device."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _meta(item) for key, item in value.items()}
    return value
