"""What a run says on stdout when it is done: one checkpoint in a few lines, all of it out of its report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median

from llmcompress.report import ADAPTER, Evaluation, RunReport


def failures(report: RunReport) -> list[str]:
    """What makes a run fail: checks that did not pass and suites whose budget was exceeded."""
    checks = [f"check {check.name}: {check.detail}" for check in report.checks if not check.passed]
    if report.engines and not any(one.loads for one in report.engines):
        checks.append(f"check: none of {', '.join(one.engine for one in report.engines)} loads it")
    return checks + [f"suite {one.suite}: over its budget" for one in report.evaluations if one.verdict == "fail"]


def summary(folder: Path, report: RunReport) -> str:
    """A few lines on the checkpoint in `folder`."""
    lines = [f"{folder}", *_size(report), *_linears(report), *_work(report), *_tuned(report)]
    lines += [*_checks(report), *_engines(report)]
    for evaluation in report.evaluations:
        lines += _evaluation(evaluation)
    lines += _speed(report)
    if (folder / "README.md").is_file() and report.output:
        lines.append(f"  card     {folder / 'README.md'}")
    return "\n".join(lines)


def megabytes(num_bytes: int) -> str:
    """Decimal units, three digits.

    >>> megabytes(2_236_064), megabytes(14_483_464_192)
    ('2.24 MB', '14.5 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def _size(report: RunReport) -> list[str]:
    if report.output is None or report.source is None:
        return []
    before, made = report.source.weights_bytes, report.output
    if made.format == ADAPTER:
        return [f"  size     {megabytes(made.weights_bytes)} beside the {megabytes(before)} of its base"]
    bits = f"{made.bits_per_weight_model:.3f} bits per weight over all"
    if made.quantized_parameters:
        bits = f"{made.bits_per_weight:.3f} bits per quantized weight, {made.bits_per_weight_model:.3f} over all"
    ratio = made.weights_bytes / before
    return [f"  size     {megabytes(made.weights_bytes)} from {megabytes(before)} ({ratio:.3f} of it); {bits}"]


def _linears(report: RunReport) -> list[str]:
    if not report.linears:
        return []
    count = {outcome: sum(row.outcome == outcome for row in report.linears) for outcome in ("fell_back", "skipped")}
    done = [row for row in report.linears if row.outcome == "quantized"]
    labels = sorted({f"{row.scheme} by {row.method}" for row in done})
    text = f"  linears  {len(done)} to {', '.join(labels)}"
    text += f"; {count['fell_back']} fell back" if count["fell_back"] else ""
    return [text + (f"; {count['skipped']} left as they were" if count["skipped"] else "")]


def _work(report: RunReport) -> list[str]:
    """Where the time of quantization went, and the rate that the work was done at."""
    work = report.work
    if work is None or not sum(work.seconds.values()):
        return []
    seconds, flops = sum(work.seconds.values()), sum(work.flops.values())
    shares = [f"{name} {share / seconds:.0%}" for name, share in sorted(work.seconds.items(), key=lambda one: -one[1])]
    lines = [f"  time     {seconds:.1f} s in the layers: {', '.join(shares)}"]
    if flops:
        rate, ideal = flops / seconds / 1e9, work.ideal_flops_per_s / 1e9
        lines.append(
            f"  rate     {rate:.3g} of {ideal:.3g} GFLOP/s ({rate / ideal:.2f} of a matrix product's): "
            + ", ".join(f"{name} {work.flops[name] / 1e9:.3g} GFLOP" for name in work.flops)
        )
    count = Counter(row.version for row in report.linears if row.held_out_error is not None)
    if count:
        kept = ", ".join(f"{number} {version}" for version, number in count.most_common())
        lines.append(f"  kept     {kept}, by the error on held-out tokens; {work.num_worse} above the plain method's")
    if work.reason:
        lines.append(f"  memory   {work.form}, activations in {work.activations}: {work.reason}")
    return lines


def _tuned(report: RunReport) -> list[str]:
    """What tuning end to end gained, where it was asked for."""
    tuning = report.tuning
    if tuning is None:
        return []
    gain = f"KL on held-out rows {tuning.held_out_kl_after:.4f} from {tuning.held_out_kl_before:.4f}"
    codes = f"{tuning.num_codes_changed:,} of {tuning.num_codes:,} codes changed"
    return [f"  tuned    {gain}; {codes}" + ("" if tuning.kept else "; not kept")]


def _checks(report: RunReport) -> list[str]:
    if not report.checks:
        return []
    wrong = [check for check in report.checks if not check.passed]
    ran = [check for check in report.checks if check.ran]
    left = f"; not run: {', '.join(check.name for check in report.checks if not check.ran)}"
    lines = [f"  checks   {len(ran) - len(wrong)} of {len(ran)} passed{left if len(ran) < len(report.checks) else ''}"]
    return lines + [f"           FAILED {check.name}: {check.detail}" for check in wrong]


def _engines(report: RunReport) -> list[str]:
    said = {True: "loads", False: "does not load", None: "not judged"}
    verdicts = [f"{one.engine} {one.version}: {said[one.loads]}" for one in report.engines]
    return [f"  engines  {'; '.join(verdicts)}"] if verdicts else []


def _speed(report: RunReport) -> list[str]:
    if report.speed is None:
        return []
    rows = {row.model: row for row in report.speed.rows}
    before, after = rows["baseline"], rows["compressed"]
    prefill, decode = (
        f"{median(getattr(before, key)):.3g} -> {median(getattr(after, key)):.3g} tokens/s"
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
    )
    memory = f"{megabytes(before.peak_memory_bytes)} -> {megabytes(after.peak_memory_bytes)}"
    loading = f"{before.load_s:.2g} -> {after.load_s:.2g} s"
    return [f"  speed    prefill {prefill}; decode {decode}; loading {loading}; peak memory {memory}"]


def _evaluation(evaluation: Evaluation) -> list[str]:
    lines = [f"  suite    {evaluation.suite}: {evaluation.verdict} ({evaluation.engine})"]
    for row in evaluation.tasks:
        low, high = row.interval
        lines.append(
            f"           {row.task:<20} {row.metric} {row.baseline.value:.4f} -> {row.compressed.value:.4f}  "
            f"{row.difference:+.4f} [{low:+.4f}, {high:+.4f}]  {row.verdict}"
        )
    for text in evaluation.texts:
        perplexities = f"{text.baseline_perplexity:.3f} -> {text.compressed_perplexity:.3f}"
        budgets = text.budget_kl, text.budget_perplexity_ratio
        verdict = "no budget" if budgets == (None, None) else text.verdict
        lines.append(f"           {text.name:<20} perplexity {perplexities}, KL {text.kl:.5f}  {verdict}")
    return lines
