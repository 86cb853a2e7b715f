"""What a run prints at its end: sizes in the words of what was made, and no verdict where no budget was set."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.pipeline.summary import summary
from llmcompress.report import ADAPTER, PLAIN, Tuning
from tests.unit.card.sample_report import full_report


@pytest.mark.parametrize(
    ("format", "quantized", "said"),
    [
        ("gptq", 1000, "bits per quantized weight"),
        (PLAIN, 0, "bits per weight over all"),
        (ADAPTER, 0, "of its base"),
    ],
)
def test_sizes_are_those_of_what_was_made(format: str, quantized: int, said: str) -> None:
    report = full_report()
    assert report.output is not None
    report.output.format, report.output.quantized_parameters = format, quantized
    (line,) = [one for one in summary(Path("out"), report).splitlines() if one.startswith("  size")]
    assert said in line and ("quantized" in line) is (format == "gptq") and ("from" in line) is (format != ADAPTER)


def test_a_text_without_a_budget_has_no_verdict() -> None:
    report = full_report()
    text = report.evaluations[0].texts[0]
    text.verdict = "pass"
    for figure in text.metrics:
        figure.budget = None
    assert f"same top-1 token {text.top1_agreement:.5f}  no budget" in summary(Path("out"), report)
    text.figure("kl").budget = 0.05
    assert f"same top-1 token {text.top1_agreement:.5f}  pass" in summary(Path("out"), report)


def test_tuning_says_what_it_gained_and_whether_it_was_kept() -> None:
    report = full_report()
    assert "  tuned" not in summary(Path("out"), report)
    report.tuning = Tuning(
        num_steps=160, num_scales=10, num_codes=2000, num_codes_changed=12, num_held_out_tokens=64,
        held_out_kl_before=0.2, held_out_kl_after=0.16, kept=True,
    )  # fmt: skip
    line = "  tuned    KL on held-out rows 0.1600 from 0.2000; 12 of 2,000 codes changed"
    assert line in summary(Path("out"), report).splitlines()
    report.tuning.kept = False
    assert f"{line}; not kept" in summary(Path("out"), report).splitlines()
