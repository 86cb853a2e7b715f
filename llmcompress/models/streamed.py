"""A model that is larger than the memory: its decoder layers are read where its own forward reaches them.

    batch 0   embed ─> ┆ layer 0 ─> ┆ layer 1 ─> ┆ … ─> ┆ head ─> logits      ┆ each batch runs in a coroutine that is
    batch 1   embed ─> ┆ layer 0 ─> ┆ layer 1 ─> ┆ … ─> ┆ head ─> logits      ┆ suspended before a layer; when all wait
    batch 2   embed ─> ┆ layer 0 ─> ┆ layer 1 ─> ┆ … ─> ┆ head ─> logits      ┆ there it is read, used by all, and freed

So any number of batches cost one pass over the weights (`logits`), and the figures are those of the whole model, bit
for bit: the same modules compute the same batches, whatever the architecture. What a batch holds while it waits is its
hidden state, which beyond a bound lies in a file (activations.py). Called like any model it reads each layer anew in
every call, which is what `generate` needs; layers stay in memory as far as `keep_bytes` goes.

In memory beside one layer: the input embedding as stored (the rows of a batch are converted as they are looked up), the
norms, and, while logits are taken, the output head. Where the weights come from is not known here (`Weights`): a plain
checkpoint, or codes that are dequantized as they are read. Suspending is `greenlet`'s, as in stream.py.

Shapes: B rows of a batch, S tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.memory import give_back
from llmcompress.models import meta
from llmcompress.models.activations import ActivationFile, Slot
from llmcompress.models.blocks import decoder_layers, hidden_size
from llmcompress.models.experts import sliced
from llmcompress.models.loading import best_device, compute_dtype
from llmcompress.models.stream import coroutines

KEEP_BYTES = 64 << 20
"""Of layers that stay in memory once they are read, so that small models are read once."""
ACTIVATION_BYTES = 256 << 20
"""Of hidden states that wait in memory; more than that waits in a file."""
BATCHES_AT_ONCE = 2048
"""Batches of one pass: each is a coroutine with a stack of its own, some tens of kilobytes."""


class Weights(Protocol):
    """Where the values of a model's parameters are read."""

    def read(self, name: str) -> torch.Tensor:
        """The parameter or stored buffer `name`, as its module keeps it. Raises: LLMCompressError without a tensor."""
        ...

    def has(self, name: str) -> bool:
        """Whether there are values for `name`."""
        ...


class CheckpointWeights:
    """A checkpoint's tensors by the names of the model's parameters; a tied one has that of its twin."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        checkpoint = sliced(checkpoint, model)
        self._checkpoint = checkpoint
        self._names = meta.stored_names(model, checkpoint.stored)
        self._twins: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        lacking = [name for name in meta.tied_parameters(model) if name not in self._names and name not in self._twins]
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        own = next((name for name, module in model.named_modules() if module is embedding), "")
        self._twins |= dict.fromkeys(lacking, f"{own}.weight")

    def has(self, name: str) -> bool:
        """See `Weights`."""
        return name in self._names or self._twins.get(name, "") in self._names

    def read(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        stored = self._names.get(name) or self._names.get(self._twins.get(name, ""))
        if stored is None:
            raise LLMCompressError(f"{self._checkpoint.name}: no tensor for {name}")
        return self._checkpoint.tensor(stored)


@dataclass(slots=True)
class _Unit:
    """A module whose weights are in memory only while it computes: a decoder layer, or the output head."""

    place: int
    path: str
    module: nn.Module
    loaded: bool = False
    kept: bool = False


class StreamedModel:
    """A causal language model whose decoder layers are read where they are reached; see the module's docstring.

    model: on the meta device (`meta.build`), taken over. `device`, `dtype`: what it computes on and in.
    keep_bytes: of layers that stay in memory. activation_bytes: of hidden states that do. first_layer: the number that
    the first layer has in `weights`, where the model is made of a few of its layers.

    Raises: LLMCompressError for a parameter without a tensor, and for a model without decoder layers.
    """

    def __init__(
        self, model: nn.Module, weights: Weights, device: torch.device, dtype: torch.dtype,
        keep_bytes: int = KEEP_BYTES, activation_bytes: int = ACTIVATION_BYTES, first_layer: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.device, self.dtype = model, device, dtype
        self._weights, self._keep_bytes, self._activation_bytes = weights, keep_bytes, activation_bytes
        self._parent: Any = None
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.tie_weights = lambda *_args, **_options: None  # type: ignore[assignment]  # read, not shared
        layers = decoder_layers(model)
        self.depth = len(layers.layers)
        self.layer_bytes = max(sum(p.numel() for p in layer.parameters()) for layer in layers.layers) * dtype.itemsize
        modules = {layers.name(index): layer for index, layer in enumerate(layers.layers)}
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is not None:
            modules[next(path for path, module in model.named_modules() if module is head)] = head
        self._units = [_Unit(place, path, module) for place, (path, module) in enumerate(modules.items())]
        self._head = self._units[-1] if head is not None else None
        self._first_layer = first_layer
        self._in_layer = re.compile(rf"({re.escape(layers.path)})\.(\d+)\.(.+)")
        names = (self._stored_name(name) for name, _ in model.named_parameters())
        lacking = [name for name in names if not weights.has(name)]
        if lacking:
            raise LLMCompressError(f"{type(model).__name__}: no tensor for {lacking[0]}")
        self._read_outside(layers.path)
        self._read_buffers()
        for unit in self._units:
            self._watch(unit)

    @property
    def in_memory(self) -> bool:
        """Whether everything that was read so far is kept."""
        return all(unit.kept for unit in self._units)

    @property
    def config(self) -> Any:
        """transformers' config of the model."""
        return self.model.config

    def get_input_embeddings(self) -> nn.Module:
        """The input embedding, as transformers' models have it."""
        return self.model.get_input_embeddings()  # type: ignore[operator, no-any-return]

    def get_output_embeddings(self) -> nn.Module | None:
        """The output head, as transformers' models have it; its weight may be a placeholder."""
        return self.model.get_output_embeddings()  # type: ignore[operator, no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, each layer read as it is reached."""
        return self.model(*args, **kwargs)

    def logits(self, batches: Sequence[torch.Tensor], keep: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """Next-token logits [B, S, V] of every batch of tokens [B, S], in order, in one pass over the layers.

        The pass is made when the first is asked for; each is computed when it is asked for, so that one is in memory at
        a time. keep: of each batch, how many of its last positions are wanted ([B, keep, V]); None: all.
        """
        keep = [batch.shape[1] for batch in batches] if keep is None else keep
        for start in range(0, len(batches), BATCHES_AT_ONCE):
            part = slice(start, start + BATCHES_AT_ONCE)
            yield from self._pass(batches[part], keep[part])

    def _pass(self, batches: Sequence[torch.Tensor], keep: Sequence[int]) -> Iterator[torch.Tensor]:
        greenlet, _ = coroutines()
        width = hidden_size(self.model)
        num_bytes = sum(batch.numel() for batch in batches) * width * self.dtype.itemsize
        file = ActivationFile(Path(tempfile.gettempdir())) if num_bytes > self._activation_bytes else None
        forwards = (functools.partial(self._forward, *pair) for pair in zip(batches, keep, strict=True))
        runs = [_Run(greenlet(forward), file) for forward in forwards]
        for run in runs:
            self._resume(run)
        while places := {run.place for run in runs if run.place is not None}:
            unit = self._units[min(places)]
            if unit is self._head:
                break
            self._load(unit)
            for run in runs:
                if run.place == unit.place:
                    self._resume(run)
            self._free(unit)
        if self._head is not None:
            self._load(self._head)
        try:
            for run in runs:
                while run.place is not None:
                    self._resume(run)
                logits_BSV, run.logits = run.logits, None
                assert logits_BSV is not None, "a forward pass ended without logits"
                yield logits_BSV
        finally:
            if self._head is not None:
                self._free(self._head)

    def _forward(self, tokens_BS: torch.Tensor, keep: int) -> torch.Tensor:
        some = {"logits_to_keep": keep} if self._keeps_some and keep < tokens_BS.shape[1] else {}
        logits_BSV: torch.Tensor = self.model(input_ids=tokens_BS.to(self.device), use_cache=False, **some).logits
        return logits_BSV[:, -keep:]

    def _resume(self, run: _Run) -> None:
        """Let one batch run to the next unit, or to its end."""
        _, getcurrent = coroutines()
        with torch.inference_mode():
            run.fetch()
            before, self._parent = self._parent, getcurrent()
            try:
                reached = run.worker.switch()
            finally:
                self._parent = before
            if run.worker.dead:
                run.place, run.logits = None, reached
            else:
                run.place, hidden_BSH = reached
                run.park(hidden_BSH)

    def _watch(self, unit: _Unit) -> None:
        """Have a unit read its weights, or wait for them, where the model calls it."""
        own = unit.module.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._parent is not None:
                self._parent.switch((unit.place, args[0] if args else kwargs.get("hidden_states")))
                return own(*args, **kwargs)
            self._load(unit)
            try:
                return own(*args, **kwargs)
            finally:
                self._free(unit)

        unit.module.forward = forward

    def _load(self, unit: _Unit) -> None:
        if unit.loaded:
            return
        num_bytes = 0
        for local, _ in list(unit.module.named_parameters()):
            value = self._weights.read(self._stored_name(f"{unit.path}.{local}")).to(self.device, self.dtype)
            meta.set_parameter(unit.module, local, value)
            num_bytes += value.nbytes
        unit.loaded, unit.kept = True, num_bytes <= self._keep_bytes
        self._keep_bytes -= num_bytes if unit.kept else 0

    def _free(self, unit: _Unit) -> None:
        if not unit.kept:
            meta.empty(unit.module)
            unit.loaded = False
            give_back()

    def _stored_name(self, name: str) -> str:
        """How the weights call a parameter or buffer of the model."""
        match = self._in_layer.match(name)
        return f"{match[1]}.{int(match[2]) + self._first_layer}.{match[3]}" if match else name

    def _read_outside(self, layers_path: str) -> None:
        """Every parameter that is neither a layer's nor the head's; the embedding's table stays as it is stored."""
        embedding, table = self.get_input_embeddings(), ""
        if isinstance(embedding, nn.Embedding) and self._head is not None:
            table = next(f"{path}.weight" for path, module in self.model.named_modules() if module is embedding)
        head = f"{self._head.path}." if self._head else "\0"
        for name, _ in list(self.model.named_parameters()):
            if not name.startswith((f"{layers_path}.", head)):
                value = self._weights.read(name)
                value = value.to(self.device, value.dtype if name == table else self.dtype)
                meta.set_parameter(self.model, name, value)
        if table:
            assert isinstance(embedding, nn.Embedding)
            _look_up_as_stored(embedding, self.dtype)

    def _read_buffers(self) -> None:
        """Every buffer on the device, with the values that the checkpoint holds for it, if any."""
        persistent = self.model.state_dict().keys()
        for path, module in self.model.named_modules():
            for local, buffer in module._buffers.items():
                name = f"{path}.{local}" if path else local
                stored = self._stored_name(name)
                if buffer is not None and name in persistent and self._weights.has(stored):
                    buffer = self._weights.read(stored).to(buffer.dtype)
                module._buffers[local] = buffer.to(self.device) if buffer is not None else None


class _Run:
    """One batch on its way: the coroutine, the unit it waits at, and its hidden state where that lies in a file."""

    def __init__(self, worker: Any, file: ActivationFile | None) -> None:
        self.worker, self._file = worker, file
        self.place: int | None = None
        self.logits: torch.Tensor | None = None
        self._slot: Slot | None = None
        self._parked: torch.Tensor | None = None

    def park(self, hidden: Any) -> None:
        """Keep the hidden state in the file and give its memory back; the frames that wait hold an empty tensor."""
        if self._file is None or not isinstance(hidden, torch.Tensor) or not hidden.is_contiguous():
            return
        if hidden.untyped_storage().nbytes() != hidden.nbytes:
            return
        copy = hidden.clone()  # a tensor whose bytes were looked at through NumPy cannot be resized
        if self._slot is None or (self._slot.shape, self._slot.dtype) != (hidden.shape, hidden.dtype):
            self._slot = self._file.slot(copy)
        else:
            self._slot.write(copy)
        hidden.untyped_storage().resize_(0)
        self._parked = hidden

    def fetch(self) -> None:
        """Bring the hidden state back to where it was."""
        if self._parked is not None:
            assert self._slot is not None
            self._parked.untyped_storage().resize_(self._parked.numel() * self._parked.element_size())
            self._parked.copy_(self._slot.read())
            self._parked = None


def _look_up_as_stored(embedding: nn.Embedding, dtype: torch.dtype) -> None:
    """Let an embedding keep its table in the dtype of the file, and convert the rows that it looks up to `dtype`."""
    own, padding = embedding.forward, embedding.padding_idx

    @functools.wraps(own)
    def forward(ids: torch.Tensor) -> torch.Tensor:
        table = embedding._parameters["weight"]
        assert table is not None
        rows, places = ids.unique(return_inverse=True)
        embedding._parameters["weight"] = nn.Parameter(table[rows].to(dtype), requires_grad=False)
        embedding.padding_idx = None
        try:
            return own(places)
        finally:
            embedding._parameters["weight"], embedding.padding_idx = table, padding

    embedding.forward = forward  # type: ignore[method-assign, assignment]


def stream_checkpoint(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, keep_bytes: int = KEEP_BYTES
) -> StreamedModel:
    """A plain checkpoint as a streamed model; dtype: None stands for that of `loading.compute_dtype`.

    Raises: LLMCompressError as `meta.build`, and for a parameter without a tensor.
    """
    model = meta.build(checkpoint)
    weights = CheckpointWeights(checkpoint, model)
    return StreamedModel(model, weights, best_device(), dtype or compute_dtype(checkpoint.config), keep_bytes)
