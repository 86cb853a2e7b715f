"""How fast it runs: both models' rounds on one machine, medians with their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

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
        ["prefill, tokens/s", *_both(rows, "prefill_tokens_per_s"), _ratio(before, after, "prefill_tokens_per_s")],
        ["decode, tokens/s", *_both(rows, "decode_tokens_per_s"), _ratio(before, after, "decode_tokens_per_s")],
        ["loading", f"{before.load_s:.2f} s", f"{after.load_s:.2f} s", f"{after.load_s / before.load_s:.2f} x"],
        ["peak memory", *_memory(before, after, "peak_memory_bytes")],
        ["of that, before loading", *_memory(before, after, "memory_before_bytes")],
    ]
    whose = "the original" if report.source and found.baseline == report.source.identity else "another checkpoint"
    header = ["speed", f"base ({whose})", "this checkpoint", "of the base"]
    by = f"The base was run by {_engine(before)}, this checkpoint by {_engine(after)}."
    return section(TITLE, _how(found, after), table(header, cells, right=(1, 2, 3)), by)


def threads(number: int) -> str:
    """How many, in words.

    >>> threads(1), threads(16)
    ('1 thread', '16 threads')
    """
    return f"{count(number)} thread{'s' * (number != 1)}"


def decode_ratio(report: RunReport) -> float | None:
    """Decode speed over the base's, medians; None where it was not measured."""
    if report.speed is None:
        return None
    rows = {row.model: median(row.decode_tokens_per_s) for row in report.speed.rows}
    return rows["compressed"] / rows["baseline"]


def _how(found: Measurement, row: Speed) -> str:
    rounds = len(row.decode_tokens_per_s)
    return (
        f"Measured on {text(found.hardware)}, {threads(found.num_threads)}: one sequence at a time, a prompt of "
        f"{count(found.prompt_tokens)} tokens, {count(found.new_tokens)} written after it. Each model had a process of "
        f"its own and they took turns, {rounds} rounds each; the median stands with the slowest and the fastest."
    )


def _spread(values: Sequence[float]) -> str:
    low, middle, high = (significant(one, 3) for one in (min(values), median(values), max(values)))
    return f"{middle} [{low}, {high}]"


def _both(rows: Mapping[Any, Speed], key: str) -> list[str]:
    return [_spread(getattr(rows[name], key)) for name in ("baseline", "compressed")]


def _memory(before: Speed, after: Speed, key: str) -> list[str]:
    values = [getattr(row, key) for row in (before, after)]
    return [*map(size, values), f"{values[1] / values[0]:.2f} x"]


def _ratio(before: Speed, after: Speed, key: str) -> str:
    return f"{median(getattr(after, key)) / median(getattr(before, key)):.2f} x"


def _engine(row: Speed) -> str:
    return f"{text(row.engine)} on {code(row.device)} in {code(row.dtype)} ({text(row.engine_note)})"
