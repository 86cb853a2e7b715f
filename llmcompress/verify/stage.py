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

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict

from llmcompress.console import Progress
from llmcompress.errors import LLMCompressError
from llmcompress.models.tasks import task
from llmcompress.report import ADAPTER, Check, RunReport
from llmcompress.verify.settings import VerifySettings

STATIC = ("files", "tensors", "untouched", "round trip", "side files")
COMPUTED = ("logits", "generation", "engine")
PLAIN = ("files", "tensors", "generation")
MERGED = ("files", "tensors", "side files", "generation")
"""What is checked of a student and of a merged checkpoint; what their making checked is kept beside it."""
FILES_ALONE = ("files",)
"""The same for an adapter's folder, which holds no model, and for an encoder, which generates nothing."""
PREFIX = "llmcompress-verify "
"""How a line with a check starts on the fresh process's stdout; whatever else is there, libraries wrote."""


class Request(BaseModel):
    """What the process is asked, in JSON: a folder, the settings of the stage, and what its caller consents to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    settings: VerifySettings
    trust_remote_code: bool = False
    allow_pickle: bool = False


def verify(
    folder: Path,
    settings: VerifySettings,
    *,
    progress: Progress,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> list[Check]:
    """Every check on one output folder, in order; none stops the others.

    trust_remote_code, allow_pickle: what the caller consents to of the source; a report is never asked.

    Raises: LLMCompressError when the folder has no report to hold it against.
    """
    report = RunReport.load(folder)
    if report.output is None:
        raise LLMCompressError(f"{folder}: its report names no quantized checkpoint")
    names = [name for name in names_of(report) if settings.forward or name not in COMPUTED]
    checks = [check for check in report.checks if check.name not in names] if not quantized(report) else []
    request = Request(folder=folder, settings=settings, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    with progress.step("verifying", len(names)) as bar, tempfile.TemporaryFile("w+") as messages:
        process = _fresh(request, messages)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(PREFIX):
                checks.append(Check.model_validate_json(line.removeprefix(PREFIX)))
                bar.advance(1, checks[-1].name)
        code = process.wait()
        messages.seek(0)
        last = (messages.read().strip().splitlines() or ["it wrote nothing"])[-1][:300]
    done = {check.name for check in checks}
    detail = f"the process ended with code {code} before it: {last}"
    return checks + [Check(name=name, passed=False, detail=detail) for name in names if name not in done]


def quantized(report: RunReport) -> bool:
    """Whether the output holds codes."""
    return report.output is not None and report.output.quantized_parameters > 0


def names_of(report: RunReport) -> tuple[str, ...]:
    """The checks that there are for a report's output, in order."""
    if quantized(report):
        return STATIC + COMPUTED
    assert report.output is not None
    generates = report.distillation is None or task(report.distillation.kind).generates
    if report.output.format == ADAPTER or not generates:
        return FILES_ALONE
    return MERGED if report.merge is not None and report.distillation is None else PLAIN


def _fresh(request: Request, messages: IO[str]) -> subprocess.Popen[str]:
    """A Python with our own code first on its path, whatever is installed; its stderr goes to a file, which cannot
    fill up and stop it as a pipe that nobody reads does."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "llmcompress.verify.fresh", request.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=messages,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
