"""What a run prints on stdout when it is done: one checkpoint in a few lines, all of it out of its report."""

from __future__ import annotations

from pathlib import Path

from llmcompress.config.stage import stages
from llmcompress.console import megabytes
from llmcompress.report import ADAPTER, RunReport


def failures(report: RunReport) -> list[str]:
    """What makes a run fail, as its stages see it: checks that did not pass, suites over their budget."""
    return [problem for stage in stages() for problem in stage.failures(report)]


def summary(folder: Path, report: RunReport) -> str:
    """A few lines on the checkpoint in `folder`: its size, then what each stage has to say."""
    lines = [f"{folder}"]
    if report.output is not None and report.source is not None:
        before, output = report.source.weights_bytes, report.output
        if output.format == ADAPTER:
            lines.append(f"  size     {megabytes(output.weights_bytes)} beside the {megabytes(before)} of its base")
        else:
            bits = f"{output.bits_per_weight_model:.3f} bits per weight over all"
            if output.quantized_parameters:
                bits = f"{output.bits_per_weight:.3f} bits per quantized weight, "
                bits += f"{output.bits_per_weight_model:.3f} over all"
            share = output.weights_bytes / before
            lines.append(
                f"  size     {megabytes(output.weights_bytes)} from {megabytes(before)} ({share:.3f} of it); {bits}"
            )
    for stage in stages():
        lines += stage.summary(report)
    if (folder / "README.md").is_file() and report.output:
        lines.append(f"  card     {folder / 'README.md'}")
    return "\n".join(lines)
