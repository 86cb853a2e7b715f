"""Several compressed versions of one base, side by side, out of their reports and nothing else.

    OUT A ─┐                ┌─ a row each: size, bits, scores with intervals, divergence, speed, verdict
    OUT B ─┼─ same base? ───┤
    OUT C ─┘                └─ which of them is beaten: smaller *and* better than it is another

What was not measured of one is a dash, never a guess; a mean over tasks is taken only over those that all of them ran.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from llmcompress.card.build import model_name
from llmcompress.card.figures import Point
from llmcompress.card.public import public
from llmcompress.errors import LLMCompressError
from llmcompress.report import Evaluation, RunReport, TaskResult, TextResult

Z95 = 1.96
NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Version:
    """One compressed version. score: mean difference from the base over the common tasks, with a 95% interval."""

    name: str
    report: RunReport
    size_bytes: int
    score: tuple[float, float, float] | None
    kl: tuple[float, float, float] | None
    beaten_by: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of them. tasks and text: what the scores were taken over."""

    base: str
    base_bytes: int
    versions: list[Version]
    tasks: list[str]
    text: str | None


def compare(folders: Sequence[Path]) -> Comparison:
    """The versions in the order given.

    Raises: LLMCompressError for fewer than two, for one without a report, and when their bases differ.
    """
    if len(folders) < 2:
        raise LLMCompressError("compare: one checkpoint has nothing to be compared with", "name two or more")
    reports = [public(RunReport.load(folder)) for folder in folders]
    for folder, report in zip(folders, reports, strict=True):
        if report.output is None or report.source is None:
            raise LLMCompressError(f"{folder}: its report describes no compressed checkpoint")
    first = reports[0].source
    assert first is not None
    for folder, report in zip(folders, reports, strict=True):
        if report.source and report.source.identity != first.identity:
            raise LLMCompressError(
                f"{folder}: was made from {report.source.name}, and {folders[0]} from {first.name}: other weights",
                "compare versions of one base",
            )
    tasks = _common([{_task_key(row) for row in _tasks(report)} for report in reports])
    texts = _common([{row.name for row in _texts(report)} for report in reports])
    text = texts[0] if texts else None
    names = _names(folders, reports)
    versions = [_version(name, report, tasks, text) for name, report in zip(names, reports, strict=True)]
    return Comparison(first.name, first.weights_bytes, _with_winners(versions), tasks, text)


def rows(found: Comparison) -> list[dict[str, str]]:
    """The table: one row per version, cells as people read them."""
    return [_row(one, found) for one in found.versions]


def plots(found: Comparison) -> list[tuple[str, list[Point]]]:
    """What the Pareto figure shows, each against size: mean score, divergence, speed where it was measured."""
    scored = [(one, one.score) for one in found.versions if one.score]
    diverged = [(one, one.kl) for one in found.versions if one.kl]
    return [
        ("mean score, version - base", [_point(one, value) for one, value in scored]),
        (f"KL from base on {found.text}, nats", [_point(one, value) for one, value in diverged]),
        ("decode, tokens/s", [_point(one, value) for one in found.versions if (value := _decode(one))]),
    ]


def _decode(one: Version) -> tuple[float, float, float] | None:
    """Decode speed: the median, the slowest and the fastest round."""
    rows = {row.model: row.decode_tokens_per_s for row in one.report.speed.rows} if one.report.speed else {}
    values = rows.get("compressed")
    return (median(values), min(values), max(values)) if values else None


def _point(one: Version, value: tuple[float, float, float]) -> Point:
    return Point(one.name, one.size_bytes / 1e6, value[0], (value[1], value[2]), one.beaten_by is None)


def _row(one: Version, found: Comparison) -> dict[str, str]:
    output = one.report.output
    assert output is not None
    linears = [row for row in one.report.linears if row.outcome == "quantized"]
    row = {
        "version": one.name,
        "layout": output.format,
        "grid": " + ".join(sorted({row.scheme or "?" for row in linears})),
        "method": " + ".join(sorted({row.method or "?" for row in linears})),
        "MB": f"{one.size_bytes / 1e6:.2f}",
        "of base": f"{one.size_bytes / found.base_bytes:.1%}",
        "bits": f"{output.bits_per_weight_model:.3f}",
    }
    scored = {_task_key(task): task for task in _tasks(one.report)}
    for key in found.tasks:
        low, high = scored[key].interval
        row[key] = f"{scored[key].compressed.value:.4f} ({scored[key].difference:+.4f} [{low:+.4f}, {high:+.4f}])"
    if found.tasks:
        row["mean difference"] = _interval(one.score, "+.4f")
    if found.text:
        row[f"KL {found.text}"] = _interval(one.kl, ".5f")
    row["decode tokens/s"] = _interval(_decode(one), ".3g")
    row["verdict"] = ", ".join(sorted({each.verdict for each in one.report.evaluations})) or "not evaluated"
    row["beaten by"] = one.beaten_by or NOTHING
    return row


def _interval(value: tuple[float, float, float] | None, spec: str) -> str:
    return NOTHING if value is None else f"{value[0]:{spec}} [{value[1]:{spec}}, {value[2]:{spec}}]"


def _names(folders: Sequence[Path], reports: Sequence[RunReport]) -> list[str]:
    """Short names; where two are alike, with the folders above them."""
    names = [model_name(folder, report) for folder, report in zip(folders, reports, strict=True)]
    alike = {name for name in names if names.count(name) > 1}
    return [
        f"{folder.resolve().parent.name}/{name}" if name in alike else name
        for folder, name in zip(folders, names, strict=True)
    ]


def _version(name: str, report: RunReport, tasks: list[str], text: str | None) -> Version:
    scored = {_task_key(row): row for row in _tasks(report)}
    kl = next((row for row in _texts(report) if row.name == text), None)
    assert report.output is not None
    return Version(
        name=name,
        report=report,
        size_bytes=report.output.weights_bytes,
        score=_mean([scored[key] for key in tasks]) if tasks else None,
        kl=(kl.kl, *kl.kl_interval) if kl else None,
    )


def _mean(scored: Sequence[TaskResult]) -> tuple[float, float, float]:
    """Mean gain over tasks with its interval, the tasks' own intervals taken as independent; a loss is below zero."""
    gains = [row.difference if row.higher_is_better else -row.difference for row in scored]
    spread = math.sqrt(sum(((row.interval[1] - row.interval[0]) / (2 * Z95)) ** 2 for row in scored)) / len(scored)
    mean = sum(gains) / len(gains)
    return mean, mean - Z95 * spread, mean + Z95 * spread


def _with_winners(versions: list[Version]) -> list[Version]:
    """Each with the version that is no larger and no worse than it, and better in one of the two."""
    return [
        Version(one.name, one.report, one.size_bytes, one.score, one.kl, _winner(one, versions)) for one in versions
    ]


def _winner(one: Version, versions: list[Version]) -> str | None:
    for other in versions:
        worth, theirs = _worth(one), _worth(other)
        if other is one or worth is None or theirs is None:
            continue
        if (
            other.size_bytes <= one.size_bytes
            and theirs >= worth
            and (other.size_bytes, theirs) != (one.size_bytes, worth)
        ):
            return other.name
    return None


def _worth(one: Version) -> float | None:
    """What versions are ranked by: divergence, which tells the smallest changes; without it, the mean score."""
    return -one.kl[0] if one.kl else one.score[0] if one.score else None


def _tasks(report: RunReport) -> list[TaskResult]:
    return [row for one in report.evaluations for row in _own(one, report).tasks]


def _texts(report: RunReport) -> list[TextResult]:
    return [row for one in report.evaluations for row in _own(one, report).texts]


def _own(evaluation: Evaluation, report: RunReport) -> Evaluation:
    """The evaluation, without its rows where its baseline is not the base: those differences are of something else."""
    if report.source and evaluation.baseline != report.source.identity:
        return evaluation.model_copy(update={"tasks": [], "texts": []})
    return evaluation


def _task_key(row: TaskResult) -> str:
    return f"{row.task} {row.metric} {row.num_fewshot}-shot"


def _common(sets: list[set[str]]) -> list[str]:
    return sorted(set.intersection(*sets))
