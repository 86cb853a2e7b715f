"""How fast it runs: both models' rounds on one machine, medians with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from llmcompress.card.markdown import code, section, table, text
from llmcompress.card.numerals import count, significant, size
from llmcompress.report import Measurement, RunReport, Speed

TITLE = "How fast it runs"


def speed(report: RunReport) -> str:
    """The section, or nothing where no speed was measured (the limits say so)."""
    found = report.speed
    if found is None:
        return ""
    rows = {row.model: row for row in found.rows}
    before, after = rows["baseline"], rows["compressed"]
    cells = [
        ["prefill, tokens/s", *map(_spread, (before.prefill_tokens_per_s, after.prefill_tokens_per_s))],
        ["decode, tokens/s", *map(_spread, (before.decode_tokens_per_s, after.decode_tokens_per_s))],
        ["loading", *(f"{row.load_s:.2f} s" for row in (before, after))],
        ["peak memory", *(size(row.peak_memory_bytes) for row in (before, after))],
        ["of that, before loading", *(size(row.memory_before_bytes) for row in (before, after))],
        ["run by", *map(_engine, (before, after))],
    ]
    ratios = [_ratio(before, after, key) for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
    for row, ratio in zip(cells, [*ratios, "", "", "", ""], strict=True):
        row.append(ratio)
    whose = "the original" if report.source and found.baseline == report.source.identity else "another checkpoint"
    header = ["speed", f"base ({whose})", "this checkpoint", "of the base"]
    return section(TITLE, _how(found, after), table(header, cells, right=(1, 2, 3)))


def decode_ratio(report: RunReport) -> float | None:
    """Decode speed over the base's, medians; None where it was not measured."""
    if report.speed is None:
        return None
    rows = {row.model: median(row.decode_tokens_per_s) for row in report.speed.rows}
    return rows["compressed"] / rows["baseline"]


def _how(found: Measurement, row: Speed) -> str:
    rounds = len(row.decode_tokens_per_s)
    return (
        f"Measured on {text(found.hardware)}, {count(found.num_threads)} threads: one sequence at a time, a prompt of "
        f"{count(found.prompt_tokens)} tokens, {count(found.new_tokens)} written after it. Each model had a process of "
        f"its own and they took turns, {rounds} rounds each; the median stands with the slowest and the fastest."
    )


def _spread(values: Sequence[float]) -> str:
    low, middle, high = (significant(one, 3) for one in (min(values), median(values), max(values)))
    return f"{middle} [{low}, {high}]"


def _ratio(before: Speed, after: Speed, key: str) -> str:
    return f"{median(getattr(after, key)) / median(getattr(before, key)):.2f} x"


def _engine(row: Speed) -> str:
    return f"{text(row.engine)} on {code(row.device)} in {code(row.dtype)} ({text(row.engine_note)})"
