"""LayerStream: calibration text through the model one decoder layer at a time, each linear exactly once.

The model's own `forward` runs, so any architecture works. It is watched at two places:

    embed ──> layer 0 ──> layer 1 ──> ...        `capture`: every layer is replaced by a recorder that notes its
      |          |           |                   arguments and hands its input on; the embeddings alone are read.
    tokens   arguments   arguments

    layer i:   batch 0 ──ln──> q ┆         ┆     `staged`: each batch runs in a coroutine that is suspended where it
               batch 1 ──ln──> q ┆  solve  ┆     reaches a linear. When all wait, the linear, with those that read the
               batch 2 ──ln──> q ┆ q, k, v ┆     same tensor, is quantized, and they go on through quantized weights.

So a linear is calibrated on the output of everything before it already quantized (GPTQ's "true sequential"), for the
price of one forward pass. The price in memory is what every batch holds where it waits; where that is too much,
`recomputed` gives the same by running each batch up to the linear in question, as often as there are such places.
`staged` can take the original model along, layer by layer in step, so that a solver sees what a linear would have read.
Suspending is `greenlet`'s; this is the one file that imports it.

Shapes: B rows of a batch, S sequence length, H hidden size, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from llmcompress.errors import LLMCompressError, third_party
from llmcompress.models.activations import ActivationFile, Slot
from llmcompress.models.experts import SplitExperts, experts_of
from llmcompress.models.vocabulary import check_ids

Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]


class Solver(Protocol):
    """Who quantizes the linears that the stream stops at; names are the linears' local names."""

    def see(self, names: Sequence[str], inputs: torch.Tensor, batch: int, original: torch.Tensor | None = None) -> None:
        """`inputs` [..., I] is what `names` are about to read in one batch; `original`, what they read in the original.

        `original` is given where the stream has an original beside it, and has the shape of `inputs`.
        """
        ...

    def solve(self, names: Sequence[str]) -> None:
        """Everything was seen: quantize `names` and put their new weights in place."""
        ...

    def forget(self) -> None:
        """What was seen since the last solution does not count."""
        ...

    def present(self, name: str) -> None:
        """The weight of `name` is about to be used."""
        ...


Agree = Callable[[int], int]
"""The least of the numbers that all processes give; the number itself where there is only one."""


class Calls:
    """One batch between layers: `hidden_BSH`, and per layer the other arguments of its call."""

    def __init__(self, hidden_BSH: torch.Tensor, arguments: Arguments) -> None:
        self.arguments = arguments
        self._hidden: torch.Tensor | Slot = hidden_BSH
        self._given: torch.Tensor | Slot | None = None
        self._file: ActivationFile | None = None

    @property
    def hidden_BSH(self) -> torch.Tensor:
        """What goes into the next layer."""
        return self._hidden.read() if isinstance(self._hidden, Slot) else self._hidden

    @hidden_BSH.setter
    def hidden_BSH(self, value: torch.Tensor) -> None:
        """Put what came out of a layer in its place."""
        if isinstance(self._hidden, Slot):
            self._hidden.write(value)
        else:
            self._hidden = value

    @property
    def shape(self) -> torch.Size:
        """Of the hidden state."""
        return self._hidden.shape

    def park(self, file: ActivationFile) -> None:
        """Keep the hidden state in `file` from now on."""
        self._file, self._hidden = file, file.slot(self.hidden_BSH)

    @property
    def given_TH(self) -> torch.Tensor | None:
        """What the experts of the present layer are given, where that was noted."""
        return self._given.read() if isinstance(self._given, Slot) else self._given

    @given_TH.setter
    def given_TH(self, value_TH: torch.Tensor) -> None:
        """Note it where the hidden state lies."""
        if isinstance(self._given, Slot):
            self._given.write(value_TH)
        else:
            self._given = value_TH if self._file is None else self._file.slot(value_TH)


@dataclass(frozen=True, slots=True)
class Original:
    """The original model beside the stream: its own copy of the layer, which nobody quantizes, and its own batches."""

    layer: nn.Module
    calls: list[Calls]


class _LastLayerReached(BaseException):  # control flow, which no `except Exception` of a model's may catch
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


class _NotHandedOn(BaseException):
    """A layer did not receive the very tensor that the one before it returned."""


def coroutines() -> tuple[Any, Any]:
    """(the class of a coroutine that can be suspended in any frame, the function that gives the one that runs)."""
    from greenlet import getcurrent, greenlet

    return greenlet, getcurrent


def capture(model: nn.Module, layers: nn.ModuleList, tokens_BS: torch.Tensor, mask_BS: torch.Tensor) -> Calls:
    """Run the model up to its first layer and note the arguments of every layer's call.

    Only what precedes the layers needs its weights. Raises: LLMCompressError for a token that the embedding has no row
    for, and when layers pass each other more than one hidden state, which a stream cannot follow.
    """
    check_ids(tokens_BS, model)
    originals = list(layers)
    mask = None if bool(mask_BS.all()) else mask_BS.to(torch.long)
    met = ""
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
        except LLMCompressError:
            raise
        except Exception as error:  # noqa: BLE001 - a model that takes what its layers return apart
            met = f" ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]})"
        finally:
            for index, layer in enumerate(originals):
                layers[index] = layer
    raise LLMCompressError(
        f"{type(model).__name__}: its decoder layers do not hand one hidden state on from each to the next{met}",
        "method rtn reads no text and needs no stream",
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
        call.hidden_BSH = _forward(layer, index, call)()


def staged(
    layer: nn.Module, index: int, calls: Sequence[Calls], groups: Sequence[Sequence[str]], solver: Solver,
    agree: Agree = int, original: Original | None = None,
) -> list[str]:  # fmt: skip
    """Move every batch through one layer, stopping all of them at each of `groups` so that it can be quantized.

    groups: targets that read one tensor, together. original: moves through its own layer in step, and what its linears
    read is shown beside. Returns: the targets that no batch reached, in any process. The order is that of the groups
    among those waited for, so it is the same on every run, also when a batch skips an expert.
    """
    stops = _Stops(layer, groups, solver.present)
    batches = _Suspended(layer, index, calls)
    beside = _Suspended(original.layer, index, original.calls) if original else None
    with ExitStack() as patched:
        patched.enter_context(stops.at(batches.pause))
        if original and beside:
            patched.enter_context(_Stops(original.layer, groups, lambda _name: None, stops.pending).at(beside.pause))
        both_models = [batches, beside] if beside else [batches]
        for number in range(len(calls)):
            for model in both_models:
                model.resume(number)
        while (first := agree(stops.earliest(batches.names()))) < len(groups):
            here = batches.at(groups[first])
            for number in here:
                unquantized = beside.inputs(number, groups[first]) if beside else None
                solver.see(groups[first], batches.inputs(number, groups[first]), number, unquantized)
            solver.solve(groups[first])
            stops.pending -= set(groups[first])
            for number in here:
                for model in both_models:
                    model.resume(number)
    return stops.left()


class _Suspended:
    """Batches on their way through one layer, each held where its forward was paused (`greenlet`)."""

    def __init__(self, layer: nn.Module, index: int, calls: Sequence[Calls]) -> None:
        greenlet, getcurrent = coroutines()
        self._parent, self._calls = getcurrent(), calls
        self._workers = [greenlet(_forward(layer, index, call)) for call in calls]
        self._waiting: dict[int, tuple[str, torch.Tensor]] = {}

    def pause(self, name: str, inputs: torch.Tensor) -> None:
        """Called from within a batch's forward: wait at the linear `name`."""
        self._parent.switch((name, inputs))

    def resume(self, number: int) -> None:
        """Let one batch run to its next pause, or to the end of the layer."""
        self._waiting.pop(number, None)
        paused_or_done = self._workers[number].switch()
        if self._workers[number].dead:
            self._calls[number].hidden_BSH = paused_or_done
        else:
            self._waiting[number] = paused_or_done

    def names(self) -> list[str]:
        """Where batches wait."""
        return [name for name, _ in self._waiting.values()]

    def at(self, group: Sequence[str]) -> list[int]:
        """The batches that wait at one of `group`, in order."""
        return [number for number in sorted(self._waiting) if self._waiting[number][0] in group]

    def inputs(self, number: int, group: Sequence[str]) -> torch.Tensor:
        """What one batch, which waits at one of `group`, is about to read there."""
        name, inputs = self._waiting.get(number, ("", torch.empty(0)))
        if name not in group:
            raise LLMCompressError(
                f"{group[0]}: the original model takes another path through the layer, so there is no input to compare",
                "set asymmetric_calibration to false",
            )
        return inputs


def recomputed(
    layer: nn.Module, index: int, calls: Sequence[Calls], groups: Sequence[Sequence[str]], solver: Solver,
    agree: Agree = int,
) -> list[str]:  # fmt: skip
    """What `staged` does, with one batch in memory at a time: each runs up to the place in question and is abandoned.

    For a layer of q/k/v, o, gate/up and down that is about two and a half forward passes instead of one. Experts are
    not run up to one by one, which would take as many passes as there are: what they are given is noted once.
    """
    stops = _Stops(layer, groups, solver.present)

    def stop(name: str, inputs: torch.Tensor) -> None:
        raise _Reached(name, inputs)

    def run_up_to(only: int | None) -> tuple[int, int | None]:
        """Run every batch up to where it stops; see those that stop at group `only`, or at the first one met."""
        met, seeing = [], only
        for number, call in enumerate(calls):
            try:
                _forward(layer, index, call)()
            except _Reached as reached:
                group = stops.rank[reached.name]
                met.append(reached.name)
                seeing = group if seeing is None else seeing
                if group == seeing:
                    solver.see(groups[group], reached.inputs, number)
        return stops.earliest(met), seeing

    with stops.at(stop):
        while True:
            earliest, seen = run_up_to(None)
            if (first := agree(earliest)) == len(groups):
                break
            experts = experts_of(layer, groups[first][0])
            if experts is not None:
                solver.forget()
                own = [group for group in groups[first:] if experts_of(layer, group[0]) is experts]
                _by_expert(layer, index, calls, experts, own, stops, solver)
                continue
            if not agree(int(seen in (first, None))):  # some batch, somewhere, stopped before what was summed for
                solver.forget()
                run_up_to(first)
            solver.solve(groups[first])
            stops.pending -= set(groups[first])
        for call in calls:
            call.hidden_BSH = _forward(layer, index, call)()
    return stops.left()


def _by_expert(
    layer: nn.Module, index: int, calls: Sequence[Calls], experts: SplitExperts, groups: Sequence[Sequence[str]],
    stops: _Stops, solver: Solver,
) -> None:  # fmt: skip
    """Solve the experts of one block, `groups` of them, each run on its own tokens alone."""
    chosen: list[torch.Tensor] = []

    def enter(hidden_TH: torch.Tensor, top_k_index_TK: torch.Tensor, _weights_TK: torch.Tensor) -> torch.Tensor:
        raise _Entered(hidden_TH, top_k_index_TK)

    experts.forward = enter  # type: ignore[method-assign, assignment]
    try:
        for call in calls:
            try:
                _forward(layer, index, call)()
            except _Entered as entered:
                call.given_TH = entered.hidden_TH
                chosen.append(entered.top_k_index_TK)
    finally:
        vars(experts).pop("forward")
    assert len(chosen) == len(calls), "a batch went past the experts"
    for group in groups:
        number = int(group[0].split(".")[-2])
        for batch, call in enumerate(calls):
            given_TH = call.given_TH
            assert given_TH is not None
            try:
                experts.run(number, given_TH, (chosen[batch] == number).nonzero()[:, 0])
            except _Reached as reached:
                solver.see(group, reached.inputs, batch)
        solver.solve(group)
        stops.pending -= set(group)


class _Entered(BaseException):
    """Unwinds a layer's forward at its experts."""

    def __init__(self, hidden_TH: torch.Tensor, top_k_index_TK: torch.Tensor) -> None:
        self.hidden_TH, self.top_k_index_TK = hidden_TH, top_k_index_TK


class _Reached(BaseException):
    """Unwinds a layer's forward at a linear that is still to be quantized."""

    def __init__(self, name: str, inputs: torch.Tensor) -> None:
        self.name, self.inputs = name, inputs


class _Stops:
    """The linears of a layer at which a forward pass is held up, as long as they are pending."""

    def __init__(
        self, layer: nn.Module, groups: Sequence[Sequence[str]], present: Callable[[str], None],
        pending: set[str] | None = None,
    ) -> None:  # fmt: skip
        self.rank = {name: position for position, names in enumerate(groups) for name in names}
        self.pending = set(self.rank) if pending is None else pending
        self._modules = {name: layer.get_submodule(name) for name in self.rank}
        self._present = present

    def earliest(self, names: Sequence[str]) -> int:
        """Position of the first group among `names`; the number of groups where there is no name."""
        return min((self.rank[name] for name in names), default=1 + max(self.rank.values(), default=-1))

    def left(self) -> list[str]:
        """What is still pending, in the order of the groups."""
        return [name for name in self.rank if name in self.pending]

    @contextmanager
    def at(self, stop: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
        """Call `stop` wherever a pending linear is reached."""

        def guarded(name: str, original: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
            def forward(inputs: torch.Tensor) -> torch.Tensor:
                if name in self.pending:
                    stop(name, inputs)
                self._present(name)
                return original(inputs)

            return forward

        try:
            for name, module in self._modules.items():
                module.forward = guarded(name, module.forward)
            yield
        finally:
            for module in self._modules.values():
                vars(module).pop("forward", None)


def _forward(layer: nn.Module, index: int, call: Calls) -> Callable[[], torch.Tensor]:
    args, kwargs = call.arguments[index]

    def forward() -> torch.Tensor:
        with third_party(f"decoder layer {index}: its forward fails on the calibration text"):
            output = layer(call.hidden_BSH, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, torch.Tensor):
            raise LLMCompressError(f"decoder layer {index}: returns a {type(hidden).__name__}, not a hidden state")
        return hidden

    return forward
