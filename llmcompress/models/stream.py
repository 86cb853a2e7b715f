"""LayerStream: calibration text through the model one decoder layer at a time, each linear exactly once.

The model's own `forward` runs, so any architecture works. It is watched at two places:

    embed ──> layer 0 ──> layer 1 ──> ...        `capture`: every layer is replaced by a recorder that notes its
      |          |           |                   arguments and hands its input on; the embeddings alone are read.
    tokens   arguments   arguments

    layer i:   batch 0 ──ln──> q ┆         ┆     `staged`: each batch runs in a coroutine that is suspended where it
               batch 1 ──ln──> q ┆  solve  ┆     reaches a linear. When all wait, the linear is quantized on what it
               batch 2 ──ln──> q ┆    q    ┆     was about to see, and they go on through the quantized weight.

So a linear is calibrated on the output of everything before it already quantized (GPTQ's "true sequential"), for the
price of one forward pass. Suspending is `greenlet`'s; this is the one file that imports it.

Shapes: B rows of a batch, S sequence length, H hidden size, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompress.errors import LLMCompressError

Solve = Callable[[str, list[torch.Tensor], list[int]], None]
"""(linear's local name, its inputs [..., I], their batch numbers): quantize it and put the new weight in place."""


@dataclass
class Calls:
    """One batch's way through the layers: `hidden_BSH`, and per layer the other arguments of its call."""

    hidden_BSH: torch.Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _LastLayerReached(Exception):
    """Unwinds the model's forward once every layer's arguments are known."""


class _Recorder(nn.Module):
    def __init__(self, layer: nn.Module, calls: Calls, last: bool, as_tuple: bool) -> None:
        super().__init__()
        self.calls, self.last, self.as_tuple = calls, last, as_tuple
        for name, value in vars(layer).items():  # models read attributes such as attention_type off their layers
            if not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, hidden_BSH: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.calls.arguments and hidden_BSH is not self.calls.hidden_BSH:
            raise _NotHandedOn
        self.calls.hidden_BSH = hidden_BSH
        self.calls.arguments.append((args, kwargs))
        if self.last:
            raise _LastLayerReached
        return (hidden_BSH,) if self.as_tuple else hidden_BSH


class _NotHandedOn(Exception):
    """A layer did not receive the very tensor that the one before it returned."""


def capture(model: nn.Module, layers: nn.ModuleList, tokens_BS: torch.Tensor, mask_BS: torch.Tensor) -> Calls:
    """Run the model up to its first layer and note the arguments of every layer's call.

    Only what precedes the layers needs its weights. Raises: LLMCompressError when layers pass each other more than
    one hidden state, which a stream cannot follow.
    """
    originals = list(layers)
    mask = None if bool(mask_BS.all()) else mask_BS.to(torch.long)
    for as_tuple in (False, True):
        calls = Calls(torch.empty(0), [])
        for index, layer in enumerate(originals):
            layers[index] = _Recorder(layer, calls, index == len(originals) - 1, as_tuple)
        try:
            model(input_ids=tokens_BS, attention_mask=mask, use_cache=False)
        except _LastLayerReached:
            return calls
        except _NotHandedOn:
            continue
        finally:
            for index, layer in enumerate(originals):
                layers[index] = layer
    raise LLMCompressError(
        f"{type(model).__name__}: its decoder layers do not hand one hidden state on from each to the next"
    )


def share_arguments(calls: Sequence[Calls]) -> None:
    """Let batches with equal arguments keep one copy: masks and position embeddings are the same for full rows."""
    first = calls[0]
    for other in calls[1:]:
        for index, (args, kwargs) in enumerate(other.arguments):
            if _equal((args, kwargs), first.arguments[index]):
                other.arguments[index] = first.arguments[index]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str, bool)) and a == b)


def plain(layer: nn.Module, index: int, calls: Sequence[Calls]) -> None:
    """Move every batch through one layer as it is."""
    for call in calls:
        args, kwargs = call.arguments[index]
        call.hidden_BSH = _hidden(layer(call.hidden_BSH, *args, **kwargs))


def staged(
    layer: nn.Module, index: int, calls: Sequence[Calls], targets: dict[str, nn.Module], solve: Solve
) -> list[str]:
    """Move every batch through one layer, stopping all of them at each of `targets` so that `solve` can quantize it.

    Returns: the targets that no batch reached. Order is module order among those waited for, so it is the same on
    every run, also when a batch skips an expert.
    """
    from greenlet import getcurrent, greenlet

    parent = getcurrent()
    pending = dict(targets)
    rank = {name: position for position, name in enumerate(targets)}
    originals = {name: module.forward for name, module in targets.items()}

    def suspended(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(inputs: torch.Tensor) -> torch.Tensor:
            if name in pending:
                parent.switch((name, inputs))
            return originals[name](inputs)  # type: ignore[no-any-return]

        return forward

    def run(call: Calls) -> Callable[[], torch.Tensor]:
        args, kwargs = call.arguments[index]
        return lambda: _hidden(layer(call.hidden_BSH, *args, **kwargs))

    workers = [greenlet(run(call)) for call in calls]
    waiting: dict[int, tuple[str, torch.Tensor]] = {}

    def go_on(number: int) -> None:
        answer = workers[number].switch()
        if workers[number].dead:
            calls[number].hidden_BSH = answer
            waiting.pop(number, None)
        else:
            waiting[number] = answer

    try:
        for name, module in targets.items():
            module.forward = suspended(name)
        for number in range(len(workers)):
            go_on(number)
        while waiting:
            name = min((waited for waited, _ in waiting.values()), key=rank.__getitem__)
            here = [number for number in sorted(waiting) if waiting[number][0] == name]
            solve(name, [waiting[number][1] for number in here], here)
            del pending[name]
            for number in here:
                waiting[number] = (name, torch.empty(0))
                go_on(number)
    finally:
        for module in targets.values():
            del module.forward
    return list(pending)


def _hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
