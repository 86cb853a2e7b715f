"""The first screen of a card: what a reader decides on, in one table, each line out of the report.

size        how much smaller          lost       by how much, and is that more than chance
speed       how much faster, where    verified   how many checks, and what was not run
runs in     the engines that passed, and on what that rests
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from llmcompress.card.kind import KINDS
from llmcompress.card.markdown import code, table, text
from llmcompress.card.numerals import count, fixed, percent, places, significant, size
from llmcompress.card.sections import shrinks, suite_verdict
from llmcompress.report import ADAPTER, PLAIN, EngineVerdict, Evaluation, Measurement, RunReport

SIGNIFICANT_P = 0.05


def glance(report: RunReport) -> str:
    """The table; empty for a report without an output."""
    if report.output is None:
        return ""
    rows = [["**size**", _size(report)], ["**speed**", _speed(report.speed)]]
    lost = "lost" if shrinks(report) else "beside its base"
    rows += [[f"**{lost}** ({code(one.suite)})", _lost(one)] for one in report.evaluations] or [
        [f"**{lost}**", "**not measured**"]
    ]
    rows += [["**verified**", _verified(report)], ["**runs in**", _runs_in(report)]]
    rows += [[f"**{name}**", value] for kind in KINDS for name, value in kind.facts(report)]
    return table(["what", "at a glance"], rows)


def _size(report: RunReport) -> str:
    assert report.output is not None
    if report.source is None:
        return size(report.output.weights_bytes)
    if report.output.format == ADAPTER:
        return (
            f"{_short_size(report.output.weights_bytes)}, loaded beside its base of "
            f"{_short_size(report.source.weights_bytes)}"
        )
    if not shrinks(report):
        return f"{_short_size(report.output.weights_bytes)}, its base {_short_size(report.source.weights_bytes)}"
    share = percent(report.output.weights_bytes / report.source.weights_bytes)
    bits = significant(report.output.bits_per_weight_model)
    return f"{_short_size(report.output.weights_bytes)}, {share} of the original; {bits} bits per weight over all"


def _short_size(num_bytes: int) -> str:
    return size(num_bytes).rpartition("(")[2].rstrip(")")


def _speed(found: Measurement | None) -> str:
    if found is None:
        return "not measured"
    rows = {row.model: row for row in found.rows}
    before, after = rows["baseline"], rows["compressed"]
    prefill, decode = (
        f"{median(getattr(after, key)) / median(getattr(before, key)):.2f} x"
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
    )
    memory = f"{_short_size(after.peak_memory_bytes)} at most, the base {_short_size(before.peak_memory_bytes)}"
    return (
        f"decode {decode}, prefill {prefill} the base's tokens/s; memory {memory}; on {text(found.hardware)} with "
        f"{text(after.engine)}"
    )


def _lost(evaluation: Evaluation) -> str:
    """The verdict, the worst task, how many changes are more than chance, and the divergence."""
    said = [suite_verdict(evaluation)]
    if evaluation.tasks:
        worst = min(evaluation.tasks, key=lambda row: row.difference if row.higher_is_better else -row.difference)
        digits = places([worst.difference, *worst.interval])
        change, low, high = (fixed(one, digits, sign=True) for one in (worst.difference, *worst.interval))
        said.append(f"worst task {code(worst.task)} {change} [{low}, {high}]")
        tested = [row for row in evaluation.tasks if row.mcnemar_p is not None]
        beyond = [row for row in tested if (row.mcnemar_p or 0) < SIGNIFICANT_P]
        if tested:
            said.append(
                f"{len(beyond) or 'none'} of {count(len(tested))} task changes significant (p < {SIGNIFICANT_P})"
            )
    for row in evaluation.texts:
        ratio = row.compressed_perplexity / row.baseline_perplexity
        said.append(f"perplexity {ratio:.4f} x and KL {significant(row.kl, 3)} nats on {code(row.name)}")
    return "; ".join(said)


def _verified(report: RunReport) -> str:
    ran = [check for check in report.checks if check.ran]
    if not ran:
        return "**no check was run**"
    failed = [check.name for check in ran if not check.passed]
    left = [check.name for check in report.checks if not check.ran]
    said = f"{len(ran) - len(failed)} of {len(ran)} checks passed"
    said += f"; **failed: {text(', '.join(failed))}**" if failed else ""
    return said + (f"; not run: {text(', '.join(left))}" if left else "")


def _runs_in(report: RunReport) -> str:
    if report.output is not None and report.output.format == ADAPTER:
        reloaded = any(one.name == "reload" and one.ran and one.passed for one in report.checks)
        return f"PEFT, on its base{' (loaded and compared)' if reloaded else ''}"
    said = list(_engines(report))
    return "; ".join(said) if said else "**in no engine that is known here**" if report.engines else "not looked into"


def _engines(report: RunReport) -> Iterator[str]:
    for one in report.engines:
        if one.loads:
            yield f"{engine_name(one)} ({loaded(report, one.engine) or 'by its loader'})"


def engine_name(verdict: EngineVerdict) -> str:
    """An engine as its makers write it, with the version that the rules are of."""
    names = {"vllm": "vLLM", "sglang": "SGLang", "tgi": "TGI", "gptqmodel": "GPTQModel"}
    return f"{names.get(verdict.engine, verdict.engine)} {verdict.version}"


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
