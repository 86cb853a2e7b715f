"""The verify stage: what lies in an output folder, held against its report and its own codes.

Nothing is trusted that is in memory: every check opens the files again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llmcompress.errors import LLMCompressError
from llmcompress.progress import Progress
from llmcompress.report import PLAIN, Check, RunReport


class VerifySettings(BaseModel):
    """The verify stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward: bool = Field(True, description="also run a few tokens through the dequantized model")


def verify(folder: Path, settings: VerifySettings, *, progress: Progress) -> list[Check]:
    """Every check on one output folder, in order; none stops the others.

    Raises: LLMCompressError when the folder has no report to hold it against.
    """
    report = RunReport.load(folder)
    if report.output is None:
        raise LLMCompressError(f"{folder}: its report names no quantized checkpoint")
    checks: list[Check] = []
    if report.output.format == PLAIN:
        return _plain_checks(folder, report, settings, progress)
    with progress.step("verifying", 4 if settings.forward else 3) as bar:
        for check in _checks(folder, report, settings):
            checks.append(check)
            bar.advance(1, check.name)
    return checks


def _plain_checks(folder: Path, report: RunReport, settings: VerifySettings, progress: Progress) -> list[Check]:
    """Those of a checkpoint without codes: its files and a forward pass, beside what the stage that made it checked."""
    made = [check for check in report.checks if check.name not in ("files", "forward")]
    with progress.step("verifying", 2) as bar:
        checks = [_files(folder, report)]
        bar.advance(1, "files")
        made_of = report.distillation
        if settings.forward and (made_of is None or made_of.kind == "causal"):
            checks.append(_forward(folder))
        bar.advance(1, "forward")
    return [*made, *checks]


def _checks(folder: Path, report: RunReport, settings: VerifySettings) -> Iterator[Check]:
    yield _files(folder, report)
    yield _tensors(folder, report)
    yield _round_trip(folder, report)
    if settings.forward:
        yield _forward(folder)


def _files(folder: Path, report: RunReport) -> Check:
    assert report.output is not None
    wrong = []
    for name, digest in report.output.digests.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif _sha256(path) != digest:
            wrong.append(f"{name} has changed")
    files = report.output.digests
    detail = "; ".join(wrong) or f"sha256 of all {len(files)} weight files equal to the report's"
    return Check(name="files", passed=not wrong, detail=detail)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors(folder: Path, report: RunReport) -> Check:
    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.models import skeleton
    from llmcompress.quantize.format import FORMATS
    from llmcompress.scheme import WeightScheme

    assert report.output is not None
    format = FORMATS.get(report.output.format)
    try:
        checkpoint = Checkpoint.open(folder)
        stored = set(checkpoint.stored)
        model = skeleton.build(checkpoint, quantized=True)
    except LLMCompressError as error:
        return Check(name="tensors", passed=False, detail=error.message)
    packed, replaced = set(), set()
    for row in report.linears:
        if row.outcome != "skipped" and row.grid is not None:
            packed |= {f"{row.stem}.{suffix}" for suffix in format.suffixes(WeightScheme(**row.grid))}  # type: ignore[arg-type]
            replaced.add(f"{row.name}.weight")
    tied = skeleton.tied_parameters(model)
    missing = packed - stored
    named = {name for name, _ in model.named_parameters()} - replaced - tied
    missing |= named - skeleton.stored_names(model, stored).keys()
    left = {f"{row.stem}.weight" for row in report.linears if row.stem} - packed
    stray = left & stored
    wrong = [f"missing: {', '.join(sorted(missing)[:3])}"] * bool(missing)
    wrong += [f"unquantized beside its codes: {', '.join(sorted(stray)[:3])}"] * bool(stray)
    return Check(
        name="tensors",
        passed=not wrong,
        detail="; ".join(wrong) or f"all {len(stored)} tensors that the model and the format need, and no leftover",
    )


def _round_trip(folder: Path, report: RunReport) -> Check:
    from llmcompress.quantize.roundtrip import mismatches

    assert report.output is not None
    count = sum(row.outcome != "skipped" for row in report.linears)
    try:
        wrong = mismatches(folder, report.output.format, report.linears)
    except LLMCompressError as error:
        return Check(name="round trip", passed=False, detail=error.message)
    said = f"{len(wrong)} of {count} linears differ from the solver's: {', '.join(wrong[:3])}"
    good = f"all {count} linears unpacked from disk and equal bit for bit to the solver's"
    return Check(name="round trip", passed=not wrong, detail=said if wrong else good)


def _forward(folder: Path) -> Check:
    import torch

    from llmcompress.quantize.dequantized import load_dequantized

    try:
        model = load_dequantized(folder)
    except LLMCompressError as error:
        return Check(name="forward", passed=False, detail=error.message)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    tokens = torch.arange(min(32, vocabulary)).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    finite = bool(torch.isfinite(logits).all())
    said = f"logits of {tokens.numel()} tokens through the dequantized model are {'' if finite else 'not '}all finite"
    return Check(name="forward", passed=finite, detail=said)
