"""The layer-wise loop: for each decoder layer observe what its linears read, solve them, pack them, move on.

    for each layer:   fill ──> stream the text through it ──> solve where a linear is due ──> pack ──> keep
                  (read ahead)     (models/stream.py)          (block_solver.py)        (written behind)

One layer is in memory at a time; what was asked for beside it is the text's hidden states and, for asymmetric
calibration, the same layer of the original.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.block_solver import LayerSolver
from llmcompress.compress.footprint import Footprint
from llmcompress.compress.methods.base import Need
from llmcompress.compress.prefetch import ReadAhead, WriteBehind
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.compress.targets import Target, Targets
from llmcompress.compress.timing import Ledger
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.data.calibration import CalibrationSet
from llmcompress.distributed import World
from llmcompress.formats.base import Format
from llmcompress.formats.roundtrip import unpack_row
from llmcompress.memory import give_back
from llmcompress.models import meta as skeleton
from llmcompress.models.activations import ActivationFile
from llmcompress.models.blocks import DecoderLayers, put_weight_OI
from llmcompress.models.experts import show_others
from llmcompress.models.loading import best_device
from llmcompress.models.shared_inputs import shared_inputs
from llmcompress.models.stream import Calls, Original, capture, plain, recomputed, share_arguments, staged
from llmcompress.report import LinearRow

Masks = Sequence[torch.Tensor | None]
"""Per batch, bool [B, S] with False on padding; None where every token is real."""


class LayerLoop:
    """Takes every layer of one model from its weights to packed tensors in the workspace.

    names: parameter -> tensor in the checkpoint. dtype: of the source's weights. streaming: how the text is held.
    """

    def __init__(
        self, source: Checkpoint, model: nn.Module, layers: DecoderLayers, names: dict[str, str], chosen: Targets,
        formats: Sequence[Format], settings: QuantizeSettings, dtype: torch.dtype, streaming: Footprint,
        workspace: Workspace, world: World, ledger: Ledger,
    ) -> None:  # fmt: skip
        self.source, self.model, self.layers, self.names = source, model, layers, names
        self.chosen, self.formats, self.settings, self.dtype = chosen, formats, settings, dtype
        self.streaming, self.workspace, self.world, self.ledger = streaming, workspace, world, ledger
        self.method, self.method_settings = settings.solver()
        self.device = best_device()
        self.compute = torch.bfloat16 if self.device.type == "cuda" and dtype == torch.bfloat16 else torch.float32
        total = len(layers.layers)
        self.start = next((index for index in range(total) if workspace.finished_rows(index) is None), total)
        self.reader, self.writer = self._read_ahead(), WriteBehind()

    def close(self) -> None:
        """Read no further, and let what is being written be finished."""
        self.reader.close()
        self.writer.close()

    def run(self, calibration: CalibrationSet | None, progress: Progress) -> None:
        """Solve every layer that an earlier run has not finished, and write it into the workspace."""
        total = len(self.layers.layers)
        if self.start > 0:
            progress.message(f"resuming: {self.start} of {total} decoder layers are done")
        if self.streaming.reason:
            streaming = self.streaming
            progress.message(f"{streaming.form}, activations in {streaming.activations}: {streaming.reason}")
        with torch.no_grad(), progress.step("quantizing decoder layers", total) as bar:
            if calibration is not None:
                show_others(self.model, self.settings.expert_tokens / calibration.tokens_NS.numel())
            calls, masks = self._captured(calibration) if calibration is not None and self.start < total else ([], [])
            beside = [Calls(call.hidden_BSH, call.arguments) for call in calls] if self.settings.runs_original() else []
            for index in range(total):
                original = self._original(index, beside) if beside else None
                if index >= self.start:
                    self._solve(index, calls, masks, original)
                elif calls:
                    self._replay(index, calls)
                    if original:
                        plain(original.layer, index, original.calls)
                give_back()
                bar.advance(1, f"layer {index}")
            with self.ledger.of("writing"):
                self.writer.wait()

    def _read_ahead(self) -> ReadAhead:
        """Reads the tensors of the layers that are still to do, in the order in which they are asked for."""
        expected: list[str] = []
        most = 0
        for index in range(self.start, len(self.layers.layers)):
            prefix = self.layers.name(index)
            paths = [f"{prefix}.{local}" for local, _ in self.layers.layers[index].named_parameters()]
            own = [self.names[path] for path in paths if path in self.names]
            most = max(most, sum(self.source.stored[name].num_bytes for name in own))
            expected += own
        return ReadAhead(self.source, expected, most)

    def _captured(self, calibration: CalibrationSet) -> tuple[list[Calls], Masks]:
        """Every batch as it enters the first layer, and its mask. Of the weights, those before the layers are read."""
        with self.ledger.of("forward"):
            outside = self._outside_names()
            for name in outside:
                if name in self.names:
                    value = self.source.tensor(self.names[name]).to(self.device, self.compute)
                    skeleton.set_parameter(self.model, name, value)
            for module in self.model.modules():
                for local, buffer in module._buffers.items():
                    module._buffers[local] = buffer.to(self.device) if buffer is not None else None
            mine = self.world.share(len(calibration.tokens_NS))
            tokens_NS, mask_NS = calibration.tokens_NS[mine], calibration.mask_NS[mine]
            rows = max(1, self.settings.batch_tokens // tokens_NS.shape[1])
            batches = list(zip(tokens_NS.split(rows), mask_NS.split(rows), strict=True))
            layers = self.model.get_submodule(self.layers.path)
            assert isinstance(layers, nn.ModuleList)
            file = ActivationFile(self.workspace.folder) if self.streaming.activations == "disk" else None
            calls: list[Calls] = []
            for tokens, mask in batches:
                calls.append(capture(self.model, layers, tokens.to(self.device), mask.to(self.device)))
                if file is not None:
                    calls[-1].park(file)
            share_arguments(calls)
            for name in outside:
                empty = torch.empty_like(self.model.get_parameter(name), device="meta")
                skeleton.set_parameter(self.model, name, empty)
            return calls, [None if bool(mask.all()) else mask.to(self.device) for _, mask in batches]

    def _outside_names(self) -> list[str]:
        """Parameters outside the decoder layers, but for the output head's: the text does not get that far."""
        inside = f"{self.layers.path}."
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        heads = {name for name, module in self.model.named_modules() if module is head} if head is not None else set()
        return [
            name
            for name, _ in self.model.named_parameters()
            if not name.startswith(inside) and name.rpartition(".")[0] not in heads
        ]

    def _original(self, index: int, calls: list[Calls]) -> Original:
        """The layer as the source has it, with the original model's batches."""
        layer = copy.deepcopy(self.layers.layers[index])
        skeleton.fill(layer, self.layers.name(index), self.names, self.source.tensor, self.device, self.compute)
        return Original(layer, calls)

    def _solve(self, index: int, calls: list[Calls], masks: Masks, original: Original | None) -> None:
        """Move the text through one layer, solving each linear where it is due, and keep what came out."""
        layer = self.layers.layers[index]
        targets = {target.local: target for target in self.chosen.of_layer(index)}
        groups = shared_inputs(layer, index, calls[0], list(targets)) if calls else []
        shift: frozenset[Need] = frozenset({"shift"} if original else ())
        solver = LayerSolver(
            layer, targets, masks, self.method, self.method_settings, self.settings.on_failure,
            self.settings.refine_sweeps, self.settings.expert_tokens, self.method.needs | shift, self.dtype,
            self.device, self.compute,
            lambda target: self.reader.tensor(target.tensor), self.ledger, self.world,
            any(format.float16_scales for format in self.formats),
        )  # fmt: skip
        with self.ledger.of("reading"):
            self._fill(index, targets, ahead=True)
        with self.ledger.of("forward"):
            if not calls:
                unreached = list(targets)
            elif self.streaming.form == "recomputed":
                unreached = recomputed(layer, index, calls, groups, solver, self.world.least)
            else:
                unreached = staged(layer, index, calls, groups, solver, self.world.least, original)
        for local in unreached:
            solver.without_calibration(local)
        skeleton.empty(layer)
        if self.world.first:
            self._keep(index, targets, solver)

    def _fill(self, index: int, targets: dict[str, Target], ahead: bool) -> None:
        """Read all of a layer but the weights that are compressed."""
        skeleton.fill(
            self.layers.layers[index], self.layers.name(index), self.names,
            self.reader.tensor if ahead else self.source.tensor, self.device, self.compute,
            leave=[f"{local}.weight" for local in targets],
        )  # fmt: skip

    def _keep(self, index: int, targets: dict[str, Target], solver: LayerSolver) -> None:
        """Pack a solved layer and have it written while the next one is solved."""
        packed: dict[str, dict[str, torch.Tensor]] = {format.name: {} for format in self.formats}
        with self.ledger.of("packing"):
            for local in list(solver.weights):
                weight = solver.weights.pop(local)
                for format in self.formats:
                    for suffix, tensor in format.pack(weight, self.dtype).items():
                        packed[format.name][f"{targets[local].stem}.{suffix}"] = tensor
        order = {target.name: position for position, target in enumerate(targets.values())}
        rows = sorted(solver.rows, key=lambda row: order[row.name])
        with self.ledger.of("writing"):
            self.writer.submit(partial(self.workspace.finish_layer, index, packed, rows))

    def _replay(self, index: int, calls: list[Calls]) -> None:
        """Move the text through a layer that an earlier run finished, through its quantized weights."""
        layer, format = self.layers.layers[index], self.formats[0]
        targets = {target.local: target for target in self.chosen.of_layer(index)}
        rows: dict[str, LinearRow] = {row.name: row for row in self.workspace.finished_rows(index) or ()}
        self._fill(index, targets, ahead=False)
        stored = self.workspace.packed([index], format.name)
        for local, target in targets.items():
            weight = unpack_row(stored, rows[target.name], format)
            put_weight_OI(layer.get_submodule(local), weight.dequantize().to(self.device, self.compute))
        with self.ledger.of("forward"):
            plain(layer, index, calls)
        skeleton.empty(layer)
