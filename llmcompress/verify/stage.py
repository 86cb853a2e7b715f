"""The verify stage: what lies in an output folder, held against its report, its source and its own codes.

    verify(OUT) ── a fresh process ──> files        sha256 of every weight file = the report's
                                       tensors      all that model and layout need, and no other
                                       untouched    tensors that were not quantized = the source's, bit for bit
                                       round trip   every linear unpacked = what the solver returned
                                       side files   tokenizer, chat template, generation config = the source's
                                       logits       near the original's, within a bound
                                       generation   writes, and the same when asked again
                                       engine       its own engine computes what we do, where it is installed

Nothing is trusted that is in memory: the checks run in a Python of their own, which knows the folder and no more. A
check that cannot be run here (the source is gone, the engine is not installed) says so and counts for nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, Field

from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError
from llmcompress.report import ADAPTER, Check, RunReport

STATIC = ("files", "tensors", "untouched", "round trip", "side files")
COMPUTED = ("logits", "generation", "engine")
PLAIN = ("files", "tensors", "generation")
MERGED = ("files", "tensors", "side files", "generation")
"""What is checked of a student and of a merged checkpoint; what their making checked is kept beside it."""
FILES_ALONE = ("files",)
"""The same for an adapter's folder, which holds no model, and for an encoder, which generates nothing."""
ANSWER = "llmcompress-verify "
"""How a line with a check or an error starts on the fresh process's stdout; whatever else is there, libraries wrote."""


class VerifySettings(BaseModel):
    """The verify stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward: bool = Field(True, description="also run both models: logits, generation, the engine's own reading")
    logits_bound: float = Field(
        0.5,
        gt=0,
        allow_inf_nan=False,
        description="largest ||logits - original's||^2 / ||original's||^2, each less its mean; unrelated models have 1",
    )


def verify(folder: Path, settings: VerifySettings, *, progress: Progress) -> list[Check]:
    """Every check on one output folder, in order; none stops the others.

    Raises: LLMCompressError when the folder has no report to hold it against.
    """
    report = RunReport.load(folder)
    if report.output is None:
        raise LLMCompressError(f"{folder}: its report names no quantized checkpoint")
    names = [name for name in names_of(report) if settings.forward or name not in COMPUTED]
    checks = [check for check in report.checks if check.name not in names] if not quantized(report) else []
    with progress.step("verifying", len(names)) as bar:
        process = _fresh(folder, settings)
        assert process.stdout is not None and process.stderr is not None
        for check in _answers(process.stdout):
            checks.append(check)
            bar.advance(1, check.name)
        said = process.stderr.read()
        code = process.wait()
    missing = [name for name in names if name not in {check.name for check in checks}]
    if missing:
        detail = f"the process ended with code {code} before it: {_last_line(said)}"
        checks += [Check(name=name, passed=False, detail=detail) for name in missing]
    return checks


def quantized(report: RunReport) -> bool:
    """Whether the output holds codes."""
    return report.output is not None and report.output.quantized_parameters > 0


def names_of(report: RunReport) -> tuple[str, ...]:
    """The checks that there are for a report's output, in order."""
    if quantized(report):
        return STATIC + COMPUTED
    assert report.output is not None
    causal = report.distillation is None or report.distillation.kind == "causal"
    if report.output.format == ADAPTER or not causal:
        return FILES_ALONE
    return MERGED if report.merge is not None and report.distillation is None else PLAIN


def _fresh(folder: Path, settings: VerifySettings) -> subprocess.Popen[str]:
    """A Python with our own code first on its path, whatever is installed."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = json.dumps({"folder": str(folder), "settings": settings.model_dump()})
    command = [sys.executable, "-m", "llmcompress.verify.fresh", asked]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _answers(lines: IO[str]) -> list[Check]:
    found = []
    for line in lines:
        if line.startswith(ANSWER):
            found.append(Check.model_validate_json(line.removeprefix(ANSWER)))
    return found


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
