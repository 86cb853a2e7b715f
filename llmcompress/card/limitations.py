"""What the report does not show, said outright: one line for each thing that was not measured or went wrong."""

from __future__ import annotations

from collections.abc import Iterator

from llmcompress.card.markdown import code, section, text
from llmcompress.report import Evaluation, RunReport


def limits(report: RunReport) -> str:
    """The last section of the card."""
    lines = [*_failures(report), *_quality(report), *_provenance(report), *map(text, report.notes)]
    return section("Limits", "\n".join(f"- {line}" for line in lines))


def _failures(report: RunReport) -> Iterator[str]:
    for stage in report.stages:
        if stage.status == "failed" and stage.name != "card":
            yield f"**Stage {code(stage.name)} failed**: {text(stage.error or 'no reason was recorded')}."
    for check in report.checks:
        if not check.passed:
            yield f"**Check {code(check.name)} failed**: {text(check.detail)}."
    fell_back = sum(row.outcome == "fell_back" for row in report.linears)
    if fell_back:
        yield f"Not solved by the method asked for: {fell_back} of {len(report.linears)} linears, named above."


def _quality(report: RunReport) -> Iterator[str]:
    if not report.evaluations:
        yield "Nothing was evaluated, so nothing is known about the quality of its answers."
    for evaluation in report.evaluations:
        yield from _verdicts(evaluation)
    if report.evaluations:
        yield "Only what the tables show was measured; other tasks, languages and longer contexts may have lost more."
    dequantized = [one for one in report.evaluations if "our dequantized weights" in one.engine_note]
    if dequantized:
        names = ", ".join(code(one.suite) for one in dequantized)
        yield f"The scores of {names} are those of its dequantized weights: an engine's own kernels round otherwise."
    for check in report.checks:
        if check.name == "engine" and not check.ran:
            yield f"Its packed weights were {text(check.detail)}."
    if report.speed is None:
        yield "Speed was not measured."
    elif any("our dequantized weights" in row.engine_note for row in report.speed.rows):
        yield "Its speed was taken on dequantized weights, since its engine was not there: its own kernels differ."
    if not report.checks:
        yield "The files were not checked after they were written."


def _verdicts(evaluation: Evaluation) -> Iterator[str]:
    for row in evaluation.overlaps:
        if row.note is not None:
            yield f"Whether the {text(row.text)} holds items of suite {code(evaluation.suite)}: {text(row.note)}."
        elif evaluation.overlap_allowed and row.num_found:
            yield (
                f"**The {text(row.text)} holds {row.num_found} of {row.num_items - row.num_short} items of "
                f"{code(row.part)}**, which was allowed: that score says little about new items."
            )
    rows = [(row.task, row.verdict) for row in evaluation.tasks]
    rows += [(row.name, row.verdict) for row in evaluation.texts]
    failed = [code(name) for name, verdict in rows if verdict == "fail"]
    unsure = [code(name) for name, verdict in rows if verdict == "inconclusive"]
    if failed:
        yield f"**It lost more than the budget of suite {code(evaluation.suite)} allows** on {', '.join(failed)}."
    if unsure:
        names = ", ".join(unsure)
        yield f"Suite {code(evaluation.suite)} does not decide on {names}: an interval reaches across the budget."


def _provenance(report: RunReport) -> Iterator[str]:
    if any(row.error_kind == "output" for row in report.linears):
        yield "Relative errors of linears are taken on the calibration text itself, not on text held out from it."
    if report.source and report.source.hub_id is None:
        yield "The original is not linked, since it was a local checkpoint and not one of the Hub."
    if report.source and report.source.licence is None:
        yield "The original states no licence; find out before you share this."
