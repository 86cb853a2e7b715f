"""What the card's template needs and the report does not hold ready: names, steps, rankings, groups, rows of cells.

    report.json ──> public() ──> view() ──> card.md.j2

Everything here is computed from the report alone; sentences are the template's, numbers are printed by numerals.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any, Literal

from llmcompress.card.linears import across_layers, kind_of, layer_of, ranges
from llmcompress.card.markdown import code, link, text
from llmcompress.card.public import last_part
from llmcompress.report import (
    ADAPTER,
    MIN_ITEMS,
    MIN_ROWS,
    PLAIN,
    Distillation,
    EngineVerdict,
    Evaluation,
    LinearRow,
    Measurement,
    RunReport,
    TaskResult,
    TextResult,
)
from llmcompress.report.merge import MAX_NOISE as MAX_NOISE
from llmcompress.report.numerals import count, fixed, p_value, percent, places, significant
from llmcompress.resources import BUNDLED

Kind = Literal["quantized", "adapter", "merged", "distilled"]
ADAPTERS = {"lora": "LoRA", "qlora": "QLoRA", "adalora": "AdaLoRA"}
CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}
LOSSES = {
    "forward_kl": "KL(teacher || student)",
    "reverse_kl": "KL(student || teacher)",
    "js": "generalized Jensen-Shannon",
    "ce": "cross-entropy on the data's labels",
    "sentence": "cosine of sentence vectors",
    "hidden_mse": "squared error of hidden states",
    "hidden_cosine": "cosine of hidden states",
    "attention_kl": "KL of attention probabilities",
    "attention_mse": "squared error of attention probabilities",
    "embedding": "squared error of embeddings",
}
ENGINES = {"transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang", "tgi": "TGI", "gptqmodel": "GPTQModel"}
RUNNABLE = ("transformers", "vllm", "sglang")
"""Engines that the template has code for, in the order in which they are shown."""
VERDICTS = {"pass": "pass", "fail": "**fail**", "inconclusive": "*inconclusive*"}
SIGNIFICANT_P = 0.05


def kind(report: RunReport) -> Kind | None:
    """What the output is, by its last step; None for a report without an output, or of one that nothing changed."""
    output = report.output
    if output is None:
        return None
    if output.quantized_parameters:
        return "quantized"
    if output.format == ADAPTER:
        return "adapter"
    if report.merge is not None:
        return "merged"
    return "distilled" if report.distillation is not None else None


def title(report: RunReport) -> str:
    """The checkpoint's name: its base and what became of it, whatever its folder is called."""
    if report.card.title:
        return report.card.title
    if report.source is None:
        return "Model"
    steps = [last_part(report.source.hub_id or report.source.name)]
    steps += ["distilled"] if report.distillation else []
    if report.output is not None and report.output.format == ADAPTER:
        steps.append(f"{ADAPTERS[report.finetune.adapter] if report.finetune else 'LoRA'} adapter")
    elif report.merge is not None:
        steps.append("fine-tuned")
    return " ".join([*steps, "+".join(schemes(report))]).strip()


def placeholder(report: RunReport) -> str:
    """What stands for a checkpoint's repository until it has one; a push puts the true name in its place."""
    name = re.sub(r"[^\w.-]+", "-", title(report), flags=re.ASCII).strip("-.")
    return f"USER/{name or 'MODEL'}"


def schemes(report: RunReport) -> list[str]:
    """The grids in the field's short form: W4A16, NF4."""
    grids = [row.grid for row in report.linears if row.grid and row.outcome != "skipped"]
    return sorted({str(grid["codebook"] or f"w{grid['num_bits']}a16").upper() for grid in grids})


def source_name(report: RunReport) -> str:
    """The base in a few words: a link for one on the Hub, never a path."""
    hub_id, source = report.card.base_model or (report.source and report.source.hub_id), report.source
    if hub_id:
        at = f" at revision {code(source.revision)}" if source and source.revision and source.hub_id else ""
        return link(hub_id, f"https://huggingface.co/{hub_id}") + at
    if source is None:
        return "a checkpoint that the report does not name"
    if source.name.startswith(BUNDLED):
        return f"{code(source.name)} (the checkpoint that comes with llmcompress)"
    return f"the local checkpoint {code(source.name)} ({code(source.architecture)})"


def grids(report: RunReport) -> list[str]:
    """Every grid in words, with its short name."""
    found = []
    for row in report.linears:
        if row.outcome == "skipped":
            continue
        label, grid = code(row.scheme or "unknown grid"), row.grid
        if grid:
            values = "NormalFloat" if grid["codebook"] == "nf4" else "integers"
            group = "one scale per row" if grid["group_size"] == -1 else f"one scale per {grid['group_size']} weights"
            label = f"{grid['num_bits']}-bit {values}, {group} ({label})"
        found.append(label)
    return list(dict.fromkeys(found))


def shrinks(report: RunReport) -> bool:
    """Whether it was made to be smaller, so that what it is measured for is a loss; adapters are to gain something."""
    output = report.output
    return output is None or output.quantized_parameters > 0 or report.distillation is not None


def view(report: RunReport, figures: dict[str, str]) -> dict[str, Any]:
    """The template's variables. figures: `scores`, `errors`, `training` -> path, those that were drawn."""
    tally = Counter(row.outcome for row in report.linears)
    return {
        "report": report,
        "figures": {name: figures.get(name) for name in ("scores", "errors", "training")},
        "kind": kind(report),
        "title": title(report),
        "model_id": placeholder(report),
        "source_name": source_name(report),
        "grids": grids(report),
        "methods": sorted({row.method for row in report.linears if row.method and row.outcome == "quantized"}),
        "shrinks": shrinks(report),
        "suites": [suite(one, report) for one in report.evaluations],
        "speed": speed(report.speed) if report.speed else None,
        "checks": {
            "failed": [one for one in report.checks if not one.passed],
            "ran": [one for one in report.checks if one.ran],
            "left": [one for one in report.checks if not one.ran],
        },
        "engines": engines(report),
        "tally": tally,
        "linear_kinds": list(linear_kinds(report.linears)),
        "exceptions": list(exceptions(report.linears)),
        "side_by_side": side_by_side(report.distillation) if report.distillation else [],
        "stages": [row for row in report.stages if row.name != "card"],
        "failed_stages": [row for row in report.stages if row.status == "failed" and row.name != "card"],
    }


def engines(report: RunReport) -> dict[str, list[dict[str, Any]]]:
    """The engines that load it (those that were seen to do so first), and those that refuse it with their reason."""
    loads = [
        {
            "verdict": one,
            "name": engine_name(one),
            "seen": loaded(report, one.engine),
            "mind": [each.detail for each in one.findings if each.level == "warns"],
        }
        for one in report.engines
        if one.loads
    ]
    order: Callable[[dict[str, Any]], tuple[bool, int]] = lambda one: (  # noqa: E731
        not one["seen"],
        (*RUNNABLE, one["verdict"].engine).index(one["verdict"].engine),
    )
    refuses = [
        {"name": engine_name(one), "why": next(each.detail for each in one.findings if each.level == "refuses")}
        for one in report.engines
        if one.loads is False
    ]
    return {"loads": sorted(loads, key=order), "refuses": refuses}


def engine_name(verdict: EngineVerdict) -> str:
    """An engine as it is written by those who make it, with the version that the rules are of."""
    return f"{ENGINES.get(verdict.engine, verdict.engine)} {verdict.version}"


def loaded(report: RunReport, engine: str) -> str | None:
    """What verify saw of the files in this engine, in a few words; None where it did not load them there.

    Codes were compared with our own reading of them; plain weights were loaded by transformers itself and wrote text.
    """
    passed = {one.name for one in report.checks if one.ran and one.passed}
    if engine != "transformers":
        return None
    if "engine" in passed:
        return "loaded and compared"
    plain = report.output is not None and report.output.format == PLAIN
    return "loaded, and it wrote text" if plain and "generation" in passed else None


def suite(evaluation: Evaluation, report: RunReport) -> dict[str, Any]:
    """One suite: its rows as cells, its losses with the largest first, and what of it was seen in training."""
    budgets = [one for row in evaluation.texts for one in (row.budget_kl, row.budget_perplexity_ratio)]
    decided = evaluation.tasks or any(one is not None for one in budgets)
    tested = [row for row in evaluation.tasks if row.mcnemar_p is not None]
    rows = [(row.task, row.verdict) for row in evaluation.tasks]
    rows += [(row.name, row.verdict) for row in evaluation.texts]
    searched = [row for row in evaluation.contamination if row.share is not None]
    return {
        "evaluation": evaluation,
        "of_the_source": report.source is not None and evaluation.baseline == report.source.identity,
        "verdict": VERDICTS[evaluation.verdict] if decided else "no budget was set",
        "tasks": [task_cells(row) for row in evaluation.tasks],
        "texts": [text_cells(row) for row in evaluation.texts],
        "losses": losses(evaluation),
        "tested": tested,
        "significant": [row for row in tested if (row.mcnemar_p or 0) < SIGNIFICANT_P],
        "failed": [code(name) for name, verdict in rows if verdict == "fail"],
        "inconclusive": [
            code(name) + _items_that_decide(evaluation, name) for name, verdict in rows if verdict == "inconclusive"
        ],
        "methods": dict.fromkeys(row.interval_method for row in evaluation.tasks),
        "searched": searched,
        "searched_texts": " and ".join(dict.fromkeys(text(row.text) for row in searched)),
        "num_seen": sum(row.num_contaminated for row in searched),
        "num_judged": sum(row.num_items - row.num_too_short for row in searched),
        "num_too_short": sum(row.num_too_short for row in searched),
    }


def _items_that_decide(evaluation: Evaluation, name: str) -> str:
    """How many items a task had and how many a verdict takes; nothing of a text."""
    row = next((row for row in evaluation.tasks if row.task == name), None)
    if row is None or row.items_needed is None:
        return ""
    return f" ({count(row.num_items)} items; about {count(row.items_needed)} decide)"


def losses(evaluation: Evaluation) -> list[str]:
    """Every text and the task that lost most, in words, the largest loss relative to the base first."""
    found = []
    for row in evaluation.texts:
        ratio = row.compressed_perplexity / row.baseline_perplexity
        digits = places([row.baseline_perplexity, row.compressed_perplexity], least=2)
        before, after = (fixed(one, digits) for one in (row.baseline_perplexity, row.compressed_perplexity))
        said = f"{code(row.name)} perplexity {before} to {after} ({fixed(ratio, places([ratio, 1.0], least=2))} x)"
        found.append((ratio - 1, said))
    if evaluation.tasks:
        found.append(max((_relative_loss(row), _task_loss(row)) for row in evaluation.tasks))
    return [said for _, said in sorted(found, reverse=True)]


def _relative_loss(row: TaskResult) -> float:
    loss = -row.difference if row.higher_is_better else row.difference
    return loss / abs(row.baseline.value) if row.baseline.value else loss


def _task_loss(row: TaskResult) -> str:
    """In points where items are right or wrong, else in the metric's own unit."""
    scale, unit, share = (100, " points", " %") if row.better is not None else (1, "", "")
    scores = [scale * row.baseline.value, scale * row.compressed.value]
    changes = [scale * one for one in (row.difference, *row.interval)]
    before, after = (fixed(one, places(scores, least=1 if unit else 4)) for one in scores)
    change, low, high = (fixed(one, places(changes, least=1 if unit else 4), sign=True) for one in changes)
    metric = text(row.metric.partition(",")[0])
    return f"{code(row.task)} {metric} {before}{share} to {after}{share} ({change}{unit} [{low}, {high}])"


def task_cells(row: TaskResult) -> list[str]:
    """task, base, this checkpoint, difference [95 % interval], flips, McNemar p, verdict."""
    direction = "" if row.higher_is_better else ", lower is better"
    what = f"{code(row.task)} {text(row.metric)}, {row.num_fewshot}-shot, {count(row.num_items)} items{direction}"
    scores = places([row.baseline.value, row.compressed.value])
    base, compressed = (
        fixed(one.value, scores) + ("" if one.stderr is None else f" ± {fixed(one.stderr, scores)}")
        for one in (row.baseline, row.compressed)
    )
    digits = places([row.difference, *row.interval, -row.budget, row.budget])
    change, low, high = (fixed(one, digits, sign=True) for one in (row.difference, *row.interval))
    flips = "not 0/1" if row.better is None or row.worse is None else f"{count(row.better)} / {count(row.worse)}"
    p = "-" if row.mcnemar_p is None else p_value(row.mcnemar_p)
    too_few = "" if row.enough else f": {count(row.num_items)} items, a verdict takes {MIN_ITEMS}"
    verdict = f"{VERDICTS[row.verdict]} (budget {significant(row.budget, 6)}){too_few}"
    return [what, base, compressed, f"{change} [{low}, {high}]", flips, p, verdict]


def text_cells(row: TextResult) -> list[str]:
    """held-out text, base perplexity, perplexity of this, ratio, KL, same top token, verdict."""
    digits = places([row.baseline_perplexity, row.compressed_perplexity], least=3)
    ratio = row.compressed_perplexity / row.baseline_perplexity
    named = (("KL", row.budget_kl), ("ratio", row.budget_perplexity_ratio))
    budgets = ", ".join(f"{name} {significant(value, 6)}" for name, value in named if value is not None)
    too_few = "" if row.enough else f": {count(row.num_rows)} rows, a verdict takes {MIN_ROWS}"
    over = (
        ""
        if row.shared_vocabulary is None
        else f", over the {count(row.shared_vocabulary)} entries that both models have"
    )
    return [
        f"{code(row.name)}, {count(row.num_tokens)} tokens in rows of {count(row.seq_len)}{over}",
        fixed(row.baseline_perplexity, digits),
        fixed(row.compressed_perplexity, digits),
        _with_interval(ratio, row.perplexity_ratio_interval, row.budget_perplexity_ratio, 1.0),
        _with_interval(row.kl, row.kl_interval, row.budget_kl),
        percent(row.top1_agreement),
        f"{VERDICTS[row.verdict]} (budget: {budgets}){too_few}" if budgets else "no budget was set",
    ]


def _with_interval(value: float, interval: tuple[float, float], *bounds: float | None) -> str:
    """`value [low, high]` with decimals enough to tell it from the bounds."""
    digits = places([value, *interval, *(bound for bound in bounds if bound is not None)])
    low, high = (fixed(end, digits) for end in interval)
    return f"{fixed(value, digits)} [{low}, {high}]"


def speed(measured: Measurement) -> dict[str, Any]:
    """Both models' rows, each rate as median [slowest, fastest] and as a ratio, and what they do not have in common."""
    rows = {row.model: row for row in measured.rows}
    before, after = rows["baseline"], rows["compressed"]

    def rate(key: str) -> dict[str, str]:
        values: list[list[float]] = [getattr(before, key), getattr(after, key)]
        base, this = (
            "{} [{}, {}]".format(*(significant(one, 3) for one in (median(each), min(each), max(each))))
            for each in values
        )
        return {"base": base, "this": this, "ratio": f"{median(values[1]) / median(values[0]):.2f} x"}

    return {
        "before": before,
        "after": after,
        "prefill": rate("prefill_tokens_per_s"),
        "decode": rate("decode_tokens_per_s"),
        "differ": measured.differing,
    }


def linear_kinds(rows: Iterable[LinearRow]) -> Iterator[list[str]]:
    """kind, count, grid, method, smallest and largest relative error: linears of all layers taken together."""
    groups: dict[tuple[str, ...], list[LinearRow]] = {}
    for row in rows:
        if row.outcome != "skipped":
            key = (kind_of(row.name), row.scheme or "", row.method or "", row.error_kind or "")
            groups.setdefault(key, []).append(row)
    for (name, scheme, method, error), group in groups.items():
        known = [(row.relative_error, layer_of(row.name)) for row in group if row.relative_error is not None]
        least = most = "not measured"
        if known:
            least = significant(min(value for value, _ in known), 3)
            value, layer = max(known, key=lambda pair: pair[0])
            where = "" if layer is None else f" in layer {layer}"
            most = f"{significant(value, 3)}{where}{' (of the weight itself)' if error == 'weight' else ''}"
        yield [code(name), count(len(group)), code(scheme), code(method), least, most]


def exceptions(rows: Iterable[LinearRow]) -> Iterator[list[str]]:
    """linear, layers, shape, outcome, reason: every linear that was skipped or fell back, layers taken together."""

    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        if row.outcome != "quantized":
            done = "not quantized" if row.outcome == "skipped" else f"fell back to {code(row.method or 'unknown')}"
            reason = text(row.reason or "no reason was recorded")
            key = (code(across_layers(row.name)), f"{row.shape[0]} x {row.shape[1]}", done, reason)
            layer = layer_of(row.name)
            groups.setdefault(key, []).extend([] if layer is None else [layer])
    for (name, shape, done, reason), layers in groups.items():
        yield [name, ranges(layers) or "-", shape, done, reason]


def side_by_side(part: Distillation) -> list[list[str]]:
    """figure, teacher, student untrained, student."""
    teacher = part.teachers[0].num_parameters if part.teachers else None
    student = count(part.student_parameters)
    rows = [["parameters", count(teacher) if teacher else "-", student, student]]
    if part.student_rows_per_s:
        rate = significant(part.teacher_rows_per_s, 3) if part.teacher_rows_per_s else "-"
        rows.append(["rows per second", rate, "-", significant(part.student_rows_per_s, 3)])
    for score in part.scores:
        values = (score.teacher, score.before, score.after)
        digits = places([value for value in values if value is not None], least=3)
        better = "higher" if score.higher_is_better else "lower"
        cells = ["-" if value is None else fixed(value, digits) for value in values]
        rows.append([f"{text(score.metric)} ({better} is better)", *cells])
    return rows
