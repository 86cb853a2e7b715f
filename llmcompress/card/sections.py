"""What this is, how much smaller it is, what that cost: the sections behind the first screen.

Cells and sentences are drawn from the report; a part that was not measured is said to be missing and never becomes an
empty table. How numbers are printed is in numerals.py.
"""

from __future__ import annotations

from llmcompress.card.markdown import code, link, section, table, text
from llmcompress.card.numerals import count, fixed, p_value, percent, places, significant, size
from llmcompress.report import Evaluation, LinearRow, Output, RunReport, Source, TaskResult, TextResult
from llmcompress.resources import BUNDLED

VERDICTS = {"pass": "pass", "fail": "**fail**", "inconclusive": "*inconclusive*"}


def headline(report: RunReport, name: str, sentence: str) -> str:
    """The title and what the thing is; `sentence` is its kind's."""
    made_by = f"Made by llmcompress {text(report.environment.llmcompress)}."
    what = f"{sentence} {made_by}" if sentence else f"{made_by} Its report describes no checkpoint."
    return f"# {text(name)}\n\n{what}"


def suite_verdict(evaluation: Evaluation) -> str:
    """The verdict of a suite, which is none where nothing in it has a budget."""
    budgets = [one for text in evaluation.texts for one in (text.budget_kl, text.budget_perplexity_ratio)]
    decided = evaluation.tasks or any(one is not None for one in budgets)
    return VERDICTS[evaluation.verdict] if decided else "no budget was set"


def grid_name(row: LinearRow) -> str:
    """The grid of a linear in words, with its short name."""
    label, grid = code(row.scheme or "unknown grid"), row.grid
    if not grid:
        return label
    kind = "NormalFloat" if grid["codebook"] == "nf4" else "integers"
    group = "one scale per row" if grid["group_size"] == -1 else f"one scale per {grid['group_size']} weights"
    return f"{grid['num_bits']}-bit {kind}, {group} ({label}),"


def source_name(source: Source | None) -> str:
    """The original in a few words: a link for one on the Hub, never a path."""
    if source is None:
        return "A checkpoint that the report does not name"
    if source.hub_id:
        at = f" at revision {code(source.revision)}" if source.revision else ""
        return link(source.hub_id, f"https://huggingface.co/{source.hub_id}") + at
    if source.name.startswith(BUNDLED):
        return f"{code(source.name)} (the checkpoint that comes with llmcompress)"
    return f"The local checkpoint {code(source.name)} ({code(source.architecture)})"


def how_much_smaller(report: RunReport) -> str:
    """Bytes and bits per weight, before and after."""
    title, source, output = "How much smaller", report.source, report.output
    if source is None or output is None:
        return section(title, "The report holds no sizes.")
    if not shrinks(report):
        return ""
    before = 8 * source.weights_bytes / source.num_parameters
    after = output.bits_per_weight_model
    rows = [
        [
            "weights",
            size(source.weights_bytes),
            size(output.weights_bytes),
            percent(output.weights_bytes / source.weights_bytes),
        ],
        ["bits per weight", significant(before), significant(after), percent(after / before)],
    ]
    if output.total_parameters != source.num_parameters:
        share = percent(output.total_parameters / source.num_parameters)
        rows.insert(1, ["parameters", count(source.num_parameters), count(output.total_parameters), share])
    header = ["size", "original", "this checkpoint", "of the original"]
    return section(title, table(header, rows, right=(1, 2, 3)), _inside(output, source))


def _inside(output: Output, source: Source) -> str:
    if not output.quantized_parameters:
        return "Nothing of it is quantized."
    share = percent(output.quantized_parameters / output.total_parameters)
    return (
        f"{count(output.quantized_parameters)} of {count(output.total_parameters)} weights ({share}) are quantized and "
        f"take {significant(output.bits_per_weight)} bits each, scales and zero points included; the others are stored "
        f"as they were ({code(source.dtype)} for the most part)."
    )


def shrinks(report: RunReport) -> bool:
    """Whether it was made to be smaller, so that what it is measured for is a loss; adapters are to gain something."""
    output = report.output
    return output is None or output.quantized_parameters > 0 or report.distillation is not None


def what_it_lost(report: RunReport, figure: str | None) -> str:
    """The comparison with the original, suite by suite; `figure` is the path of the plot, if there is one."""
    title = "What it lost" if shrinks(report) else "Beside its base"
    if not report.evaluations:
        return section(
            title, "Nothing was evaluated: neither tasks nor held-out text were run, so how good it is is unknown."
        )
    identity = report.source.identity if report.source else None
    parts = [part for one in report.evaluations for part in _suite(one, identity)]
    plot = f"![Score differences with their intervals, and the budget]({figure})" if figure else ""
    return section(title, *parts, plot)


def _suite(evaluation: Evaluation, identity: str | None) -> list[str]:
    base = (
        "Base is the original"
        if evaluation.baseline == identity
        else f"Base is **not** the original but the checkpoint with sha256 {code(evaluation.baseline)}"
    )
    parts = [
        f"Suite {code(evaluation.suite)}: {suite_verdict(evaluation)}. {base}; both saw the same items, with "
        f"{text(evaluation.harness)}, seed {evaluation.seed}. This checkpoint was run by {text(evaluation.engine)} on "
        f"{code(evaluation.device)} in {code(evaluation.dtype)} ({text(evaluation.engine_note)})."
    ]
    if evaluation.tasks:
        header = ["task", "base", "this checkpoint", "difference [95 % interval]", "flips", "McNemar p", "verdict"]
        parts += [table(header, [_task(row) for row in evaluation.tasks], right=(1, 2, 3, 4, 5)), _TASK_LEGEND]
    if evaluation.texts:
        header = [
            "held-out text",
            "base perplexity",
            "perplexity of this",
            "ratio [95 % interval]",
            "KL [95 % interval]",
        ]
        rows = [_text(row) for row in evaluation.texts]
        parts += [table([*header, "same top token", "verdict"], rows, right=(1, 2, 3, 4, 5)), _TEXT_LEGEND]
    parts += _overlap(evaluation)
    missing = [name for name, rows in (("task", evaluation.tasks), ("held-out text", evaluation.texts)) if not rows]
    return [*parts, f"The suite ran no {' and no '.join(missing)}."] if missing else parts


def _overlap(evaluation: Evaluation) -> list[str]:
    """One sentence on the text that it was made with, where that could be looked into."""
    known = [row for row in evaluation.overlaps if row.share is not None]
    if not known:
        return []
    texts = " and ".join(dict.fromkeys(text(row.text) for row in known))
    found = sum(row.num_found for row in known)
    judged = sum(row.num_items - row.num_short for row in known)
    short = sum(row.num_short for row in known)
    left = f" ({count(short)} more are too short to tell)" if short else ""
    said = f"{count(found)} of {count(judged)} items"
    return [f"Seen before? {said} share 13 words in a row with the {texts}{left}."]


_TASK_LEGEND = (
    "Difference is this checkpoint minus base over the same items, with a paired bootstrap interval. Flips: items that "
    "became right / became wrong; McNemar's exact p asks whether those could be a fair coin. The verdict is pass when "
    "the whole interval lies within the budget, fail when all of it lies beyond, else inconclusive: more items would "
    "tell."
)
_TEXT_LEGEND = "KL is that of its next-token distribution from the base's, in nats per token."


def _task(row: TaskResult) -> list[str]:
    direction = "" if row.higher_is_better else ", lower is better"
    what = f"{code(row.task)} {text(row.metric)}, {row.num_fewshot}-shot, {count(row.num_items)} items{direction}"
    scores = places([row.baseline.value, row.compressed.value])
    base, compressed = (
        fixed(one.value, scores) + ("" if one.stderr is None else f" ± {fixed(one.stderr, scores)}")
        for one in (row.baseline, row.compressed)
    )
    bounds = (*row.interval, -row.budget, row.budget)
    digits = places([row.difference, *bounds])
    low, high = (fixed(end, digits, sign=True) for end in row.interval)
    difference = f"{fixed(row.difference, digits, sign=True)} [{low}, {high}]"
    flips = "not 0/1" if row.better is None or row.worse is None else f"{count(row.better)} / {count(row.worse)}"
    p = "-" if row.mcnemar_p is None else p_value(row.mcnemar_p)
    return [what, base, compressed, difference, flips, p, f"{VERDICTS[row.verdict]} (budget {_short(row.budget)})"]


def _text(row: TextResult) -> list[str]:
    digits = places([row.baseline_perplexity, row.compressed_perplexity], least=3)
    base, compressed = (fixed(one, digits) for one in (row.baseline_perplexity, row.compressed_perplexity))
    ratio = row.compressed_perplexity / row.baseline_perplexity
    budgets = [
        f"{name} {_short(value)}"
        for name, value in (("KL", row.budget_kl), ("ratio", row.budget_perplexity_ratio))
        if value is not None
    ]
    verdict = f"{VERDICTS[row.verdict]} (budget: {', '.join(budgets)})" if budgets else "no budget was set"
    over = "" if row.shared_entries is None else f", over the {count(row.shared_entries)} entries that both models have"
    return [
        f"{code(row.name)}, {count(row.num_tokens)} tokens in rows of {count(row.seq_len)}{over}",
        base,
        compressed,
        _with_interval(ratio, row.perplexity_ratio_interval, row.budget_perplexity_ratio, 1.0),
        _with_interval(row.kl, row.kl_interval, row.budget_kl),
        percent(row.top1_agreement),
        verdict,
    ]


def _with_interval(value: float, interval: tuple[float, float], *bounds: float | None) -> str:
    """`value [low, high]` with decimals enough to tell it from the bounds."""
    digits = places([value, *interval, *(bound for bound in bounds if bound is not None)])
    low, high = (fixed(end, digits) for end in interval)
    return f"{fixed(value, digits)} [{low}, {high}]"


def _short(budget: float) -> str:
    return significant(budget, 6)
