"""The scratch folder of a run under way: one file per finished layer and layout, so that a killed run goes on there.

.OUT.partial/key                      what this work is for; another key starts over
.OUT.partial/layer-00003.json         the rows of layer 3: written last, so its being there means the layer is done
.OUT.partial/layer-00003.gptq         safetensors of the packed tensors, one per layout
.OUT.partial/tuned-00003.*             the same after effort max; they count once the file `tuning` is there
.OUT.partial/final/                   the folder that is renamed to OUT
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmcompress.checkpoint.safetensors import TensorFiles
from llmcompress.checkpoint.writer import unfinished
from llmcompress.files import write_atomic
from llmcompress.report import LinearRow, Tuning


@dataclass(frozen=True, slots=True)
class Workspace:
    """The scratch folder beside the output `out`; see the module's docstring."""

    folder: Path

    @classmethod
    def open(cls, out: Path, key: str) -> Workspace:
        """The workspace for `out`, kept if it was begun under the same key, else begun anew."""
        folder = cls.of(out).folder
        mark = folder / "key"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mark.write_text(key, encoding="utf-8")
        shutil.rmtree(folder / "final", ignore_errors=True)
        return cls(folder)

    @classmethod
    def of(cls, out: Path) -> Workspace:
        """The workspace for `out` as another process opened it."""
        return cls(unfinished(out))

    @property
    def final(self) -> Path:
        """The folder to be renamed to the output."""
        return self.folder / "final"

    def layer_file(self, layer: int, suffix: str, tuned: bool | None = None) -> Path:
        """Where a layer's packed tensors (suffix: the format) or rows (json) lie; None: the tuned ones if complete."""
        name = "tuned" if (self.tuning is not None and self.tuning.kept if tuned is None else tuned) else "layer"
        return self.folder / f"{name}-{layer:05d}.{suffix}"

    @property
    def tuning(self) -> Tuning | None:
        """What effort max did, once it is done."""
        path = self.folder / "tuning"
        return Tuning.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish_tuning(self, tuning: Tuning) -> None:
        """Say that the tuned layers are complete."""
        write_atomic(self.folder / "tuning", tuning.model_dump_json().encode())

    def finished_rows(self, layer: int) -> list[LinearRow] | None:
        """The rows of a finished layer, or None when it is still to do."""
        path = self.layer_file(layer, "json")
        if not path.is_file():
            return None
        return [LinearRow.model_validate(row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def finish_layer(
        self, layer: int, packed: Mapping[str, Mapping[str, torch.Tensor]], rows: Sequence[LinearRow],
        tuned: bool = False,
    ) -> None:  # fmt: skip
        """Keep a finished layer: its tensors per layout, then its rows. Each file appears whole or not at all."""
        from safetensors.torch import save

        for format, tensors in packed.items():
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_atomic(self.layer_file(layer, format, tuned), save(contiguous))
        text = json.dumps([row.model_dump() for row in rows])
        write_atomic(self.layer_file(layer, "json", tuned), text.encode())

    def packed(self, layers: Sequence[int], format: str) -> TensorFiles:
        """The packed tensors of finished layers, where they lie."""
        return TensorFiles.open([self.layer_file(layer, format) for layer in layers])

    def discard(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
