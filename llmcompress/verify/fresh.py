"""`python -m llmcompress.verify.fresh`: the checks of one folder, each printed as soon as it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.report import Check, RunReport
from llmcompress.verify import behaviour, files
from llmcompress.verify.stage import COMPUTED, PREFIX, Request, names_of, quantized


def checks(request: Request) -> Iterator[Check]:
    """Every check on one output folder, in the order of stage.py."""
    folder, report = request.folder, RunReport.load(request.folder)
    names = names_of(report)
    source = original(report, request) if {"untouched", "side files", "logits"} & set(names) else None
    checkpoint, missing = (source, "") if isinstance(source, Checkpoint) else (None, source or "")
    comparisons: dict[str, Callable[[], Check]] = {
        "files": lambda: files.digests(folder, report),
        "tensors": lambda: files.tensors(folder, report, checkpoint),
        "round trip": lambda: files.round_trip(folder, report),
    }
    if checkpoint is not None:
        comparisons["untouched"] = lambda: files.untouched(folder, report, checkpoint)
        comparisons["side files"] = lambda: files.side_files(folder, checkpoint)
    for name in names:
        if name in comparisons:
            yield _run(name, comparisons[name])
        elif name not in COMPUTED:
            yield Check(name=name, passed=True, ran=False, detail=f"not run: {missing}")
    if not request.settings.forward:
        return
    trust, bound = request.trust_remote_code, request.settings.logits_bound
    if quantized(report):
        yield from behaviour.checks(folder, checkpoint, missing, bound, report.seed, trust)
    elif "generation" in names:
        yield _run("generation", lambda: behaviour.generation(folder, report.seed, trust))


def original(report: RunReport, request: Request) -> Checkpoint | str:
    """The checkpoint that went in, or why it cannot be held against what came out."""
    if report.source is None:
        return "the report names no source"
    try:
        checkpoint = Checkpoint.open(
            report.source.name,
            revision=report.source.revision,
            trust_remote_code=request.trust_remote_code,
            allow_pickle=request.allow_pickle,
        )
    except LLMCompressError as error:
        return f"the source is not there ({error.message})"
    if checkpoint.identity() != report.source.identity:
        return f"{report.source.name} is no longer the checkpoint that went in: its sha256 differs"
    return checkpoint


def _run(name: str, action: Callable[[], Check]) -> Check:
    """The check; what it meets on its way is its failure."""
    try:
        with third_party("it cannot be run"):
            return action()
    except LLMCompressError as error:
        return Check(name=name, passed=False, detail=error.message)


def main() -> None:
    """Print a line for each check that the first argument asks for."""
    for check in checks(Request.model_validate_json(sys.argv[1])):
        sys.stdout.write(f"{PREFIX}{check.model_dump_json()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
