"""The stages of this folder: evaluate asks what was lost, measure how fast it is."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from llmcompress.config.stage import Context, Stage, Work
from llmcompress.console import megabytes
from llmcompress.evaluate.settings import EvaluateSettings, MeasureSettings
from llmcompress.report.evaluate import MIN_ITEMS, MIN_ROWS, TaskResult, TextResult

if TYPE_CHECKING:
    from llmcompress.report import Evaluation, RunReport


class Evaluate(Stage):
    """Both models on the same items; see `stage.py`."""

    name = "evaluate"
    kind = "check"
    help = "Compare a checkpoint with its baseline on the same items, and update its card."
    Settings = EvaluateSettings
    takes_adapter = True

    def fingerprint(self, settings: EvaluateSettings, context: Context) -> str:
        """The bytes of the suite and of its texts, and which checkpoint the baseline is."""
        from llmcompress.evaluate.suite import chosen_suite

        baseline = context.open(settings.baseline).identity() if settings.baseline else ""
        return f"{chosen_suite(settings.suite, settings.tasks).digest()} {baseline}"

    def run(self, settings: EvaluateSettings, work: Work) -> None:
        """Run the suite; an evaluation by another suite stays in the report."""
        from llmcompress.evaluate.stage import evaluate
        from llmcompress.report import FOLDER

        evaluation = evaluate(
            work.out, work.open(settings.baseline) if settings.baseline else work.checkpoint, settings,
            seed=work.seed, progress=work.progress, samples_dir=work.out / FOLDER / "samples" if work.record else None,
            allow_pickle=work.allow_pickle,
        )  # fmt: skip
        others = [earlier for earlier in work.report.evaluations if earlier.suite != evaluation.suite]
        work.report.evaluations = [*others, evaluation]

    def summary(self, report: RunReport) -> list[str]:
        """A line per suite, and below it one per task and text."""
        return [line for evaluation in report.evaluations for line in _evaluation_lines(evaluation)]

    def rows(self, settings: EvaluateSettings, report: RunReport) -> list[Any]:
        """A row for each task and each text of the suite."""
        from llmcompress.evaluate.suite import chosen_suite

        name = chosen_suite(settings.suite, settings.tasks).name
        return [
            row
            for evaluation in report.evaluations
            if evaluation.suite == name
            for row in (*evaluation.tasks, *evaluation.texts)
        ]

    def failures(self, report: RunReport) -> list[str]:
        """Suites whose budget was exceeded."""
        return [f"suite {row.suite}: over its budget" for row in report.evaluations if row.verdict == "fail"]


def _evaluation_lines(evaluation: Evaluation) -> list[str]:
    lines = [f"  suite    {evaluation.suite}: {evaluation.verdict} ({evaluation.engine})"]
    lines += [f"           {difference}" for difference in evaluation.differing]
    for row in evaluation.tasks:
        low, high = row.interval
        lines.append(
            f"           {row.task:<20} {row.metric} {row.baseline.value:.4f} -> {row.compressed.value:.4f}  "
            f"{row.difference:+.4f} [{low:+.4f}, {high:+.4f}]  {row.verdict}{_few(row)}"
        )
    for text in evaluation.texts:
        verdict = text.verdict if any(figure.budget is not None for figure in text.metrics) else "no budget"
        figures = ", ".join(
            f"{figure.label} {figure.value:.5f}"
            if figure.baseline is None or figure.compressed is None
            else f"{figure.label} {figure.baseline:.3f} -> {figure.compressed:.3f}"
            for figure in text.metrics
        )
        lines.append(f"           {text.name:<20} {figures}  {verdict}{_few(text)}")
    return lines


def _few(row: TaskResult | TextResult) -> str:
    """Why there is no verdict, where there was too little for one, or what would bring it."""
    if isinstance(row, TextResult):
        return "" if row.enough else f" ({row.num_rows} rows; a verdict takes {MIN_ROWS})"
    if not row.enough:
        return f" ({row.num_items} items; a verdict takes {MIN_ITEMS})"
    if row.verdict == "inconclusive" and row.items_needed is not None:
        return f" ({row.num_items:,} items; about {row.items_needed:,} decide)"
    return ""


class Measure(Stage):
    """Speed and memory of both models, their rounds taken in turn; see `speed.py`."""

    name = "measure"
    kind = "check"
    help = "Time a checkpoint and its baseline in turn (prefill, decode, loading, memory), and update its card."
    Settings = MeasureSettings
    takes_adapter = True

    def fingerprint(self, settings: MeasureSettings, context: Context) -> str:
        """Which checkpoint the baseline is."""
        return context.open(settings.baseline).identity() if settings.baseline else ""

    def run(self, settings: MeasureSettings, work: Work) -> None:
        """Time both."""
        from llmcompress.evaluate.speed import measure

        baseline = work.open(settings.baseline) if settings.baseline else work.checkpoint
        work.report.speed = measure(work.out, baseline, settings, progress=work.progress)

    def summary(self, report: RunReport) -> list[str]:
        """Tokens per second, loading time and memory, before and after."""
        if report.speed is None:
            return []
        rows = {row.model: row for row in report.speed.rows}
        before, after = rows["baseline"], rows["compressed"]
        differing = "; ".join(report.speed.differing)
        prefill, decode = (
            f"{median(getattr(before, key)):.3g} -> {median(getattr(after, key)):.3g} tokens/s"
            for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
        )
        memory = f"{megabytes(before.peak_memory_bytes)} -> {megabytes(after.peak_memory_bytes)}"
        loading = f"{before.load_s:.2g} -> {after.load_s:.2g} s"
        first = [f"  speed    {differing}"] if differing else []
        return [*first, f"  speed    prefill {prefill}; decode {decode}; loading {loading}; peak memory {memory}"]

    def rows(self, settings: MeasureSettings, report: RunReport) -> list[Any]:
        """A row for each of the two models."""
        return list(report.speed.rows) if report.speed else []
