"""Several compressed versions of one base, side by side, out of their reports and nothing else.

    OUT A ─┐                ┌─ a row each: size, bits, scores with intervals, divergence, speed, verdict
    OUT B ─┼─ same base? ───┤
    OUT C ─┘                └─ which of them is beaten: smaller *and* better than it is another

Two figures share a row only where they were measured alike: the same items and tokens (by count, by digest, and by the
base's own score on them), the same dtype, the same harness and seed, engines' own kernels or dequantized weights in
both. Otherwise the row says what differs, and nothing is ranked by it. What was not measured of one is a dash; a mean
over tasks is taken over those that all of them ran alike.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from llmcompress.card.figures import Point
from llmcompress.card.public import public
from llmcompress.card.view import title
from llmcompress.errors import LLMCompressError
from llmcompress.report import Evaluation, RunReport, TaskResult, TextResult
from llmcompress.report.numerals import size

Z95 = 1.96
NOTHING = "-"
TEMPLATE = Path(__file__).with_name("compare.html.j2")
Interval = tuple[float, float, float]
"""A value with both ends of its 95% interval."""


@dataclass(frozen=True, slots=True)
class Version:
    """One compressed version. score: mean difference from the base over the common tasks."""

    name: str
    report: RunReport
    size_bytes: int
    tasks: dict[str, tuple[TaskResult, dict[str, str]]]
    texts: dict[str, tuple[TextResult, dict[str, str]]]
    score: Interval | None = None
    kl: Interval | None = None
    beaten_by: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of them. tasks, texts: those that all of them ran; differing: of these, what differs between versions."""

    base: str
    base_bytes: int
    versions: list[Version]
    tasks: list[str]
    texts: list[str]
    differing: dict[str, list[str]]

    @property
    def text(self) -> str | None:
        """The text that versions are ranked by: the first that all of them were measured on alike."""
        return next((name for name in self.texts if name not in self.differing), None)


def compare(folders: Sequence[Path]) -> Comparison:
    """The versions in the order given.

    Raises: LLMCompressError for fewer than two, for one without a report, and when their bases differ.
    """
    if len(folders) < 2:
        raise LLMCompressError("compare: one checkpoint has nothing to be compared with", "name two or more")
    reports = [public(RunReport.load(folder)) for folder in folders]
    first = reports[0].source
    for folder, report in zip(folders, reports, strict=True):
        if report.output is None or report.source is None or first is None:
            raise LLMCompressError(f"{folder}: its report describes no compressed checkpoint")
        if report.source.identity != first.identity:
            raise LLMCompressError(
                f"{folder}: was made from {report.source.name}, and {folders[0]} from {first.name}: other weights",
                "compare versions of one base",
            )
    assert first is not None
    versions = [_version(name, report) for name, report in zip(_names(folders), reports, strict=True)]
    tasks = sorted(set.intersection(*(set(one.tasks) for one in versions)))
    texts = sorted(set.intersection(*(set(one.texts) for one in versions)))
    differing = {name: ways for name in (*tasks, *texts) if (ways := _differing(name, versions))}
    found = Comparison(first.name, first.weights_bytes, versions, tasks, texts, differing)
    alike = [name for name in tasks if name not in differing]
    scored = [
        replace(
            one,
            score=_mean([one.tasks[name][0] for name in alike]) if alike else None,
            kl=_kl(one.texts[found.text][0]) if found.text else None,
        )
        for one in versions
    ]
    return replace(found, versions=[replace(one, beaten_by=_winner(one, scored)) for one in scored])


def _version(name: str, report: RunReport) -> Version:
    assert report.output is not None
    tasks: dict[str, tuple[TaskResult, dict[str, str]]] = {}
    texts: dict[str, tuple[TextResult, dict[str, str]]] = {}
    for one in report.evaluations:
        if report.source and one.baseline != report.source.identity:
            continue  # its differences are from something else than the base
        for task in one.tasks:
            alike = {"items": str(task.num_items), "digest of the items": (task.items_sha256 or "")[:12]}
            alike |= {"score of the base": f"{task.baseline.value:.6g}"}
            tasks[f"{task.task} {task.metric} {task.num_fewshot}-shot"] = task, alike | _conditions(one)
        for text in one.texts:
            alike = {"tokens": str(text.num_tokens), "tokens per row": str(text.seq_len)}
            alike |= {"digest of the tokens": (text.tokens_sha256 or "")[:12]}
            alike |= {"perplexity of the base": f"{text.baseline_perplexity:.5g}"}
            texts[text.name] = text, alike | _conditions(one)
    return Version(name, report, report.output.weights_bytes, tasks, texts)


def _conditions(evaluation: Evaluation) -> dict[str, str]:
    return {
        "dtype": evaluation.dtype,
        "harness": evaluation.harness,
        "kernels": evaluation.kernels,
        "seed": str(evaluation.seed),
    }


def _differing(name: str, versions: Sequence[Version]) -> list[str]:
    """How a task or text was measured, an entry a version, where two that are known differ; empty where all agree."""
    measured = [(one.tasks.get(name) or one.texts[name])[1] for one in versions]
    keys = [key for key in measured[0] if len({each[key] for each in measured if each[key]}) > 1]
    return [", ".join(f"{key} {each[key] or 'not known'}" for key in keys) for each in measured] if keys else []


def rows(found: Comparison) -> list[dict[str, str]]:
    """The table: one row per version, cells as people read them."""
    return [dict(_cells(index, one, found)) for index, one in enumerate(found.versions)]


def _cells(index: int, one: Version, found: Comparison) -> Iterator[tuple[str, str]]:
    output = one.report.output
    assert output is not None
    linears = [row for row in one.report.linears if row.outcome == "quantized"]
    yield "version", one.name
    yield "model", title(one.report)
    yield "format", output.format
    yield "grid", " + ".join(sorted({row.scheme or "?" for row in linears})) or NOTHING
    yield "method", " + ".join(sorted({row.method or "?" for row in linears})) or NOTHING
    yield "size", size(one.size_bytes)
    yield "of base", f"{one.size_bytes / found.base_bytes:.1%}"
    yield "bits per weight", f"{output.bits_per_weight_model:.3f}"
    for name in found.tasks:
        task = one.tasks[name][0]
        low, high = task.interval
        yield (
            name,
            _comparable(
                found, name, index, f"{task.compressed.value:.4f} ({task.difference:+.4f} [{low:+.4f}, {high:+.4f}])"
            ),
        )
    if one.score:
        yield "mean difference", _interval(one.score, "+.4f")
    for name in found.texts:
        yield f"KL {name}", _comparable(found, name, index, _interval(_kl(one.texts[name][0]), ".5f"))
    yield "decode tokens/s", _interval(_decode(one), ".3g")
    yield "verdict", ", ".join(sorted({each.verdict for each in one.report.evaluations})) or "not evaluated"
    yield "beaten by", one.beaten_by or NOTHING


def _comparable(found: Comparison, name: str, index: int, cell: str) -> str:
    return f"not comparable: {found.differing[name][index]}" if name in found.differing else cell


def plots(found: Comparison) -> list[tuple[str, list[Point]]]:
    """What the Pareto figure shows, each against size: mean score, divergence, speed where it was measured."""
    measures = (
        ("mean score, version - base", [one.score for one in found.versions]),
        (f"KL from base on {found.text}, nats", [one.kl for one in found.versions]),
        ("decode, tokens/s", [_decode(one) for one in found.versions]),
    )
    return [
        (
            axis,
            [
                Point(one.name, one.size_bytes / 1e6, value[0], value[1:], one.beaten_by is None)
                for one, value in zip(found.versions, values, strict=True)
                if value
            ],
        )
        for axis, values in measures
    ]


def page(found: Comparison, figure: Path | None) -> str:
    """The comparison as one HTML page with `figure` inside: the Pareto plot, if there was anything to plot."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    picture = base64.b64encode(figure.read_bytes()).decode() if figure else None
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(found=found, rows=rows(found), picture=picture, base_size=size(found.base_bytes))


def _kl(row: TextResult) -> Interval:
    return row.kl, *row.kl_interval


def _decode(one: Version) -> Interval | None:
    """Decode speed: the median, the slowest and the fastest round."""
    measured = {row.model: row.decode_tokens_per_s for row in one.report.speed.rows} if one.report.speed else {}
    values = measured.get("compressed")
    return (median(values), min(values), max(values)) if values else None


def _interval(value: Interval | None, spec: str) -> str:
    return NOTHING if value is None else f"{value[0]:{spec}} [{value[1]:{spec}}, {value[2]:{spec}}]"


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; where two are alike, with the folders above them."""
    whole = [folder.resolve() for folder in folders]
    short = [folder.name for folder in whole]
    return [f"{folder.parent.name}/{folder.name}" if short.count(folder.name) > 1 else folder.name for folder in whole]


def _mean(scored: Sequence[TaskResult]) -> Interval:
    """Mean gain over tasks with its interval, the tasks' own intervals taken as independent; a loss is below zero."""
    gains = [row.difference if row.higher_is_better else -row.difference for row in scored]
    spread = math.sqrt(sum(((row.interval[1] - row.interval[0]) / (2 * Z95)) ** 2 for row in scored)) / len(scored)
    mean = sum(gains) / len(gains)
    return mean, mean - Z95 * spread, mean + Z95 * spread


def _winner(one: Version, versions: Sequence[Version]) -> str | None:
    """A version that is no larger and no worse than this one, and better in one of the two.

    Versions are ranked by divergence, which tells the smallest changes; without it, by the mean score.
    """

    def worth(version: Version) -> float | None:
        return -version.kl[0] if version.kl else version.score[0] if version.score else None

    mine = worth(one)
    for other in versions:
        theirs = worth(other)
        if mine is None or theirs is None or other.size_bytes > one.size_bytes or theirs < mine:
            continue
        if (other.size_bytes, theirs) != (one.size_bytes, mine):
            return other.name
    return None
