"""The last step of quantization: finished layers and untouched tensors become checkpoints, checked, then named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

from torch import nn

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import StoredTensor, torch_dtype
from llmcompress.checkpoint.source import has_chat_template, side_files, source_metadata
from llmcompress.checkpoint.writer import give_name, write_shards
from llmcompress.compress.targets import Targets
from llmcompress.compress.workspace import Workspace
from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import Format, Layout
from llmcompress.formats.roundtrip import mismatches
from llmcompress.models.meta import FLOATS
from llmcompress.report import Check, Output, RunReport, Source


def describe_source(source: Checkpoint, model: nn.Module) -> Source:
    """What the report says of the checkpoint that went in."""
    sizes: dict[str, int] = {}
    for tensor in source.stored.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    dtype = max(sizes, key=sizes.__getitem__)
    return Source(
        name=source.name,
        hub_id=source.hub_id,
        revision=source.revision,
        identity=source.identity(),
        architecture=type(model).__name__,
        dtype=str(torch_dtype(dtype)).removeprefix("torch."),
        num_parameters=sum(prod(tensor.shape) for tensor in source.stored.values() if tensor.dtype in FLOATS),
        weights_bytes=sum(tensor.num_bytes for tensor in source.stored.values()),
        chat_template=has_chat_template(source.folder),
        **source_metadata(source.folder),
    )


def assemble(
    source: Checkpoint, out: Path, workspace: Workspace, formats: Sequence[Format], layout: Layout, chosen: Targets,
    report: RunReport, progress: Progress,
) -> None:  # fmt: skip
    """Write one folder per layout, reopen each and compare, save the report inside, then rename to `out`.

    Raises: LLMCompressError when what is on disk is not bit for bit what the solver returned.
    """
    with progress.step("writing and checking", len(formats)) as bar:
        for format in formats:
            folder = workspace.final / format.name if len(formats) > 1 else workspace.final
            folder.mkdir(parents=True)
            _write(source, folder, workspace, format, layout, chosen, report)
            report.save(folder)
            bar.advance(1, format.name)
    give_name(workspace.final, out)
    workspace.discard()


def _write(
    source: Checkpoint, folder: Path, workspace: Workspace, format: Format, layout: Layout, chosen: Targets,
    report: RunReport,
) -> None:  # fmt: skip
    replaced = {target.tensor for target in chosen.targets}
    kept = [tensor for name, tensor in source.stored.items() if name not in replaced]
    layers = sorted({target.layer for target in chosen.targets})
    packed = list(workspace.packed(layers, format.name).stored.values())
    digests = write_shards(folder, [*kept, *packed])
    for path in side_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    config = {**source.config, "quantization_config": format.quantization_config(layout)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, text in format.extra_files(layout).items():
        (folder / name).write_text(text, encoding="utf-8")
    wrong = mismatches(folder, format.name, report.linears)
    if wrong:
        raise LLMCompressError(
            f"{format.name}: {len(wrong)} of {len(chosen.targets)} linears on disk differ from what was solved "
            f"({wrong[0]})",
            "the disk or its memory is at fault; run again",
        )
    same = f"all {len(chosen.targets)} linears reopened from {format.name} files and equal bit for bit to the solver's"
    report.checks = [Check(name="round trip", passed=True, detail=same)]
    report.output = _output(folder, format, digests, packed, kept, chosen)


def _output(
    folder: Path, format: Format, digests: dict[str, str], packed: Sequence[StoredTensor],
    kept: Sequence[StoredTensor], chosen: Targets,
) -> Output:  # fmt: skip
    quantized = sum(target.out_features * target.in_features for target in chosen.targets)
    rest = sum(prod(tensor.shape) for tensor in kept if tensor.dtype in FLOATS)
    packed_bytes = sum(tensor.num_bytes for tensor in packed)
    total_bytes = packed_bytes + sum(tensor.num_bytes for tensor in kept)
    return Output(
        format=format.name,
        files={name: (folder / name).stat().st_size for name in digests},
        digests=digests,
        weights_bytes=total_bytes,
        bits_per_weight=8 * packed_bytes / quantized,
        bits_per_weight_model=8 * total_bytes / (quantized + rest),
        quantized_parameters=quantized,
        total_parameters=quantized + rest,
    )
