"""What stands behind the figures: the recipe, the text, every linear, the checks, the machine, and the limits."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import yaml

from llmcompress.card.linears import across_layers, kind_of, layer_of, ranges
from llmcompress.card.markdown import code, fenced, section, table, text
from llmcompress.card.numerals import count, significant, size
from llmcompress.report import Check, LinearRow, RunReport

ERRORS = {"output": "the output on the calibration text", "weight": "the weight itself"}


def recipe(report: RunReport) -> str:
    """Every value of the run, in the form that `llmcompress run` takes."""
    if not report.recipe:
        return section("Recipe", "The report holds no recipe.")
    content = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=120)
    how = "Saved as `recipe.yaml`, with the paths of your machine, `llmcompress run recipe.yaml` does the same again."
    original = f"The original has the identity sha256 {code(report.source.identity)}." if report.source else ""
    return section("Recipe", fenced("yaml", content), how, original)


def calibration(report: RunReport) -> str:
    """The text that the codes were chosen on."""
    found = report.calibration
    if found is None and not report.linears:
        return section("Calibration text", "The report names none.") if _codes(report) else ""
    if found is None:
        return section("Calibration text", "None: the codes were chosen from the weights alone.")
    rows = [
        ["set", code(found.name)],
        ["source", code(found.source)],
        ["licence", text(found.licence) if found.licence else "not stated"],
        ["size", f"{count(found.num_samples)} rows of {count(found.seq_len)} tokens, {count(found.num_tokens)} tokens"],
        ["chat template", "applied" if found.chat_template else "not applied"],
        ["seed", f"{found.seed}"],
        ["sha256 of the token ids", code(found.sha256)],
    ]
    return section("Calibration text", table(["what", "value"], rows))


def _codes(report: RunReport) -> bool:
    """Whether the checkpoint holds codes, or is not known not to."""
    return report.output is None or report.output.quantized_parameters > 0


def linears(report: RunReport, figure: str | None) -> str:
    """Error by kind of linear, then every linear that was left alone or fell back, with its reason."""
    if not report.linears:
        return section("Linear by linear", "The report holds no row on any linear.") if _codes(report) else ""
    tally = Counter(row.outcome for row in report.linears)
    said = (
        f"Of {count(len(report.linears))} linears, quantized as asked: {count(tally['quantized'])}; fell back to "
        f"another method: {count(tally['fell_back'])}; left as they were: {count(tally['skipped'])}."
    )
    plot = f"![Relative error of every kind of linear, layer by layer]({figure})" if figure else ""
    parts = (said, _by_kind(report.linears), plot, _exceptions(report.linears), _notes(report))
    return section("Linear by linear", *parts)


def _by_kind(rows: list[LinearRow]) -> str:
    groups: dict[tuple[str, ...], list[LinearRow]] = {}
    for row in rows:
        if row.outcome != "skipped":
            key = (kind_of(row.name), row.scheme or "", row.method or "", row.error_kind or "")
            groups.setdefault(key, []).append(row)
    cells = [
        [code(kind), count(len(group)), code(scheme), code(method), *_extremes(group)]
        for (kind, scheme, method, _), group in groups.items()
    ]
    if not cells:
        return ""
    header = ["kind", "count", "grid", "method", "smallest relative error", "largest relative error"]
    kinds = sorted({row.error_kind for row in rows if row.error_kind})
    meaning = f"Relative error: the squared error of {_or(kinds)}, over its own squared size." if kinds else ""
    return f"{table(header, cells, right=(1, 4))}\n\n{meaning}".strip()


def _or(kinds: list[Literal["output", "weight"]]) -> str:
    return " or ".join(ERRORS[kind] for kind in kinds)


def _extremes(group: list[LinearRow]) -> tuple[str, str]:
    """The smallest error, and the largest with the layer it is in."""
    known = [(row.relative_error, row) for row in group if row.relative_error is not None]
    if not known:
        return "not measured", "not measured"
    least, (most, row) = min(error for error, _ in known), max(known, key=lambda pair: pair[0])
    layer = layer_of(row.name)
    kind = f" (of {ERRORS[row.error_kind]})" if row.error_kind == "weight" else ""
    where = f" in layer {layer}" if layer is not None else ""
    return significant(least, 3), f"{significant(most, 3)}{where}{kind}"


def _exceptions(rows: list[LinearRow]) -> str:
    groups: dict[tuple[str, ...], list[LinearRow]] = {}
    for row in rows:
        if row.outcome != "quantized":
            shape = f"{row.shape[0]} x {row.shape[1]}"
            done = "left as it was" if row.outcome == "skipped" else f"fell back to {code(row.method or 'unknown')}"
            key = (across_layers(row.name), shape, done, row.reason or "no reason was recorded")
            groups.setdefault(key, []).append(row)
    if not groups:
        return "No linear was skipped and none fell back."
    cells = [
        [code(name), _layers(group), shape, done, text(reason)] for (name, shape, done, reason), group in groups.items()
    ]
    return table(["linear", "layers", "out x in", "what happened", "why"], cells)


def _layers(group: list[LinearRow]) -> str:
    return ranges(layer for row in group if (layer := layer_of(row.name)) is not None) or "-"


def _notes(report: RunReport) -> str:
    return "\n".join(f"- {code(row.name)}: {text(note)}" for row in report.linears for note in row.notes)


def checks(report: RunReport) -> str:
    """What was verified on the files."""
    if not report.checks:
        return section("Checks", "No check was run on the files.")
    rows = [[text(one.name), _result(one), text(one.detail)] for one in report.checks]
    return section("Checks", table(["check", "result", "what was compared"], rows))


def _result(check: Check) -> str:
    return "not run" if not check.ran else "passed" if check.passed else "**failed**"


def environment(report: RunReport) -> str:
    """Versions, machine and what the stages took. The card's own stage is left out: it is being drawn."""
    made = report.environment
    versions = [["llmcompress", made.llmcompress], ["Python", made.python], *map(list, made.libraries.items())]
    where = f"{made.processor}, {made.platform}, number of threads {count(made.num_threads)}"
    machine = f"Made {text(report.created)} on {text(where)}, {text(made.accelerator or 'no accelerator')}."
    stages = [
        [text(row.name), f"{row.seconds:.1f} s", size(row.peak_memory_bytes), "failed" if row.error else "done"]
        for row in report.stages
        if row.name != "card"
    ]
    header = ["stage", "time", "peak memory of the process so far", "outcome"]
    took = table(header, stages, right=(1, 2)) if stages else "How long it took was not recorded."
    cells = [[text(name), text(version)] for name, version in versions]
    return section("Where it was made", machine, took, table(["software", "version"], cells))
