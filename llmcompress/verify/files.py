"""Checks that compare bytes: files with digests, tensors with what is needed, and all the rest with the source."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.files import read_json
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import side_files as files_beside
from llmcompress.report import Check, RunReport

OWN_KEYS = ("quantization_config",)
"""The keys of config.json that the output has of its own."""
MOST_SHOWN = 3


def digests(folder: Path, report: RunReport) -> Check:
    """sha256 of every weight file, and no weight file beside those of the report."""
    assert report.output is not None
    wrong = []
    for name, digest in report.output.digests.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif _sha256(path) != digest:
            wrong.append(f"{name} has changed")
    extra = {path.name for path in folder.glob("*.safetensors")} - report.output.digests.keys()
    wrong += [f"{name} is not of this checkpoint" for name in sorted(extra)]
    good = f"sha256 of all {len(report.output.digests)} weight files equal to the report's"
    return Check(name="files", passed=not wrong, detail="; ".join(wrong) or good)


def tensors(folder: Path, report: RunReport, source: Checkpoint | None) -> Check:
    """Every tensor that the model and the layout need is stored, and none besides but what the source had too."""
    from llmcompress.formats.base import FORMATS
    from llmcompress.formats.roundtrip import row_scheme
    from llmcompress.models import meta

    assert report.output is not None
    format = FORMATS.get(report.output.format) if report.output.quantized_parameters else None
    checkpoint = Checkpoint.open(folder)
    stored = set(checkpoint.stored)
    model = meta.build(checkpoint, quantized="quantization_config" in checkpoint.config)
    packed, replaced = set(), set()
    for row in report.linears:
        if format is not None and row.outcome != "skipped" and row.grid is not None:
            packed |= {f"{row.tensor_prefix}.{suffix}" for suffix in format.suffixes(row_scheme(row))}
            replaced.add(f"{row.name}.weight")
    sources = meta.stored_names(model, stored)
    needed = {name for name, _ in model.named_parameters()} - replaced - meta.tied_parameters(model)
    missing = (packed - stored) | (needed - sources.keys())
    own = {sources[name] for name in model.state_dict() if name in sources and name not in replaced}
    weights = {
        f"{row.tensor_prefix}.weight" for row in report.linears if row.tensor_prefix and row.outcome != "skipped"
    } - packed
    beside = set(source.stored) - weights if source else set()
    stray = stored - packed - (own - weights) - beside
    wrong = [f"missing: {_few(missing)}"] * bool(missing) + [f"stray: {_few(stray)}"] * bool(stray)
    good = f"all {len(stored)} tensors that the model and the layout need, and no other"
    return Check(name="tensors", passed=not wrong, detail="; ".join(wrong) or good)


def untouched(folder: Path, report: RunReport, source: Checkpoint) -> Check:
    """Every tensor that was not quantized has the source's dtype, shape and bytes."""
    from llmcompress.models import meta
    from llmcompress.models.experts import sliced

    checkpoint = Checkpoint.open(folder)
    source = sliced(source, meta.build(source))
    replaced = {
        f"{row.tensor_prefix}.weight" for row in report.linears if row.tensor_prefix and row.outcome != "skipped"
    }
    names = [name for name in source.stored if name not in replaced]
    wrong = [name for name in names if not _same(checkpoint, source, name)]
    good = f"all {len(names)} tensors that were not quantized equal to the source's, byte for byte"
    bad = f"{len(wrong)} of {len(names)} tensors are not the source's: {_few(wrong)}"
    return Check(name="untouched", passed=not wrong, detail=bad if wrong else good)


def _same(checkpoint: Checkpoint, source: Checkpoint, name: str) -> bool:
    here, there = checkpoint.stored.get(name), source.stored[name]
    if here is None or (here.dtype, here.shape) != (there.dtype, there.shape):
        return False
    return all(ours == theirs for ours, theirs in zip(here.chunks(), there.chunks(), strict=True))


def round_trip(folder: Path, report: RunReport) -> Check:
    """Every quantized linear unpacked from disk, its codes, scales and zero points those that the solver returned."""
    from llmcompress.formats.roundtrip import mismatches

    assert report.output is not None
    count = sum(row.outcome != "skipped" for row in report.linears)
    wrong = mismatches(folder, report.output.format, report.linears)
    bad = f"{len(wrong)} of {count} linears differ from the solver's: {_few(wrong)}"
    good = f"all {count} linears unpacked from disk and equal bit for bit to the solver's"
    return Check(name="round trip", passed=not wrong, detail=bad if wrong else good)


def side_files(folder: Path, source: Checkpoint) -> Check:
    """Tokenizer, chat template, generation config, code and all but one key of config.json are the source's."""
    names = [path.name for path in files_beside(source.folder)]
    wrong = [f"{name} is missing" for name in names if not (folder / name).is_file()]
    wrong += [
        f"{name} is not the source's"
        for name in names
        if (folder / name).is_file() and (folder / name).read_bytes() != (source.folder / name).read_bytes()
    ]
    config: dict[str, Any] = read_json(folder / "config.json")
    keys = (config.keys() | source.config.keys()) - set(OWN_KEYS)
    wrong += [f"config.json: {key} differs" for key in sorted(keys) if config.get(key) != source.config.get(key)]
    good = f"{', '.join(names) or 'no file'} and the rest of config.json are the source's"
    return Check(name="side files", passed=not wrong, detail="; ".join(wrong[:MOST_SHOWN]) if wrong else good)


def _few(names: set[str] | list[str]) -> str:
    shown = sorted(names)[:MOST_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
