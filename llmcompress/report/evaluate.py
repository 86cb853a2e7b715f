"""One suite: both models on the same items and texts."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from llmcompress.report.part import Part

Verdict = Literal["pass", "fail", "inconclusive"]
MIN_ITEMS, MIN_ROWS = 50, 16
"""Least items of a task and rows of a text for a verdict. Below 50 items one flip is more than the 2 points of a usual
budget; below 16 rows an interval is too narrow where a few rows lost most (eval/results/intervals.md)."""
Kernels = Literal["plain", "native", "dequantized"]
"""Whose arithmetic a figure rests on: transformers on plain weights, the layout's own package, or our reading."""


class Score(Part):
    """A metric with its standard error."""

    value: float
    stderr: float | None = None


class TaskResult(Part):
    """One task and metric, both models on the same items. Written by evaluate."""

    task: str
    metric: str = Field(description="lm-eval's name, e.g. acc")
    num_fewshot: int
    num_items: int
    items_sha256: str | None = Field(default=None, description="of the items' digests: documents and exact prompts")
    baseline: Score
    compressed: Score
    difference: float = Field(description="mean of compressed - baseline over the items")
    interval: tuple[float, float] = Field(description="95%, of the difference")
    interval_method: str = Field(default="percentile bootstrap", description="how the interval was taken")
    items_needed: int | None = Field(
        default=None,
        description="items that a verdict at this budget takes, planned before the run; None: none would do",
    )
    better: int | None = Field(default=None, description="items wrong before, right after (0/1 metrics)")
    worse: int | None = Field(default=None, description="items right before, wrong after")
    mcnemar_p: float | None = Field(default=None, description="exact two-sided")
    budget: float = Field(description="largest loss that the suite accepts, in the metric's unit")
    verdict: Verdict
    higher_is_better: bool = True
    dataset_name: str | None = None
    dataset_path: str | None = None
    dataset_split: str | None = None
    hub_dataset: bool = Field(default=False, description="dataset_path is a Hub dataset id, so model-index may name it")

    @property
    def enough(self) -> bool:
        """Whether there were items enough for a verdict; with fewer, its score goes into no metadata either."""
        return self.num_items >= MIN_ITEMS


class TextFigure(Part):
    """One metric on one held-out text. Written by evaluate for every metric that it knows, all alike."""

    metric: str = Field(description="its name, e.g. kl")
    label: str
    unit: str
    baseline: float | None = Field(default=None, description="of the baseline alone, where it is a figure of one model")
    compressed: float | None = None
    value: float = Field(description="of the pair: a ratio, a divergence, an agreement")
    interval: tuple[float, float] = Field(description="95% over rows, of value")
    interval_method: str = Field(default="percentile bootstrap", description="how the interval was taken")
    same: float = Field(description="value of two equal models")
    higher_is_better: bool = False
    budget: float | None = Field(default=None, description="largest loss that the suite accepts")
    verdict: Verdict | None = Field(default=None, description="None: it has no budget")


class TextResult(Part):
    """One held-out text through both models, per token. Written by evaluate."""

    name: str
    num_tokens: int
    seq_len: int
    tokens_sha256: str | None = Field(default=None, description="of the token ids")
    metrics: list[TextFigure]
    shared_vocabulary: int | None = Field(
        default=None, description="entries of the vocabulary compared, where the models differ in padding rows"
    )
    verdict: Verdict

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, values: Any) -> Any:
        """The three metrics that version 1 had as fields of their own."""
        if not isinstance(values, dict) or "metrics" in values or "kl" not in values:
            return values
        before, after = values["baseline_perplexity"], values["compressed_perplexity"]
        agreement = values["top1_agreement"]
        ratio = {
            "metric": "perplexity", "label": "perplexity", "unit": "ratio", "same": 1.0,
            "baseline": before, "compressed": after, "value": after / before,
            "interval": values["perplexity_ratio_interval"], "budget": values.get("budget_perplexity_ratio"),
        }  # fmt: skip
        kl = {
            "metric": "kl", "label": "KL(baseline || compressed)", "unit": "nats per token", "same": 0.0,
            "value": values["kl"], "interval": values["kl_interval"], "budget": values.get("budget_kl"),
        }  # fmt: skip
        top1 = {
            "metric": "top1_agreement", "label": "same top-1 token", "unit": "share", "same": 1.0,
            "value": agreement, "interval": (agreement, agreement), "higher_is_better": True,
        }  # fmt: skip
        folded = {"kl", "kl_interval", "top1_agreement", "baseline_perplexity", "compressed_perplexity"}
        folded |= {"perplexity_ratio_interval", "budget_kl", "budget_perplexity_ratio"}
        others = {key: value for key, value in values.items() if key not in folded}
        return others | {"metrics": [ratio, kl, top1]}

    @property
    def num_rows(self) -> int:
        """Rows; each predicts all its tokens but the first."""
        return round(self.num_tokens / (self.seq_len - 1))

    @property
    def enough(self) -> bool:
        """Whether there were rows enough for a verdict."""
        return self.num_rows >= MIN_ROWS

    def figure(self, metric: str) -> TextFigure:
        """The row of a metric. Raises: KeyError where it was not measured."""
        rows = {row.metric: row for row in self.metrics}
        return rows[metric]

    @property
    def baseline_perplexity(self) -> float:
        """exp of the baseline's mean negative log-likelihood per token."""
        return self.figure("perplexity").baseline or math.nan

    @property
    def compressed_perplexity(self) -> float:
        """The same of the compressed model."""
        return self.figure("perplexity").compressed or math.nan

    @property
    def perplexity_ratio_interval(self) -> tuple[float, float]:
        """95% interval of compressed / baseline."""
        return self.figure("perplexity").interval

    @property
    def kl(self) -> float:
        """Mean KL(baseline || compressed) of the next-token distribution, nats per token."""
        return self.figure("kl").value

    @property
    def kl_interval(self) -> tuple[float, float]:
        """95% interval of it."""
        return self.figure("kl").interval

    @property
    def top1_agreement(self) -> float:
        """Share of tokens where both rank the same next token first."""
        return self.figure("top1_agreement").value

    @property
    def budget_kl(self) -> float | None:
        """Largest KL that the suite accepts."""
        return self.figure("kl").budget

    @property
    def budget_perplexity_ratio(self) -> float | None:
        """Largest ratio of perplexities that the suite accepts."""
        return self.figure("perplexity").budget


class Contamination(Part):
    """What a text that made the checkpoint shares with a part of the suite. Written by evaluate."""

    text: str = Field(description="what it was made with, e.g. calibration set tiny")
    part: str = Field(description="task or text of the suite; * for all of them")
    num_items: int = 0
    num_too_short: int = Field(default=0, description="items too short to judge")
    num_contaminated: int = Field(
        default=0, description="items that share a run of 13 words (all of them, from 8 words on)"
    )
    share: float | None = Field(default=None, description="found, over those that can be judged; None: not looked into")
    example: str | None = None
    note: str | None = Field(default=None, description="why it was not looked into")


class Evaluation(Part):
    """One suite. Written by evaluate."""

    suite: str
    baseline: str = Field(description="identity of the baseline checkpoint")
    baseline_cached: bool
    engine: str = Field(description="what computed the compressed model's numbers")
    engine_note: str = Field(description="the engine's own kernels, or our dequantized weights, and why")
    kernels: Kernels = "native"
    device: str
    dtype: str
    baseline_engine: str | None = Field(default=None, description="what computed the baseline's numbers")
    baseline_dtype: str | None = Field(default=None, description="that it was computed in")
    baseline_stored_dtype: str | None = Field(default=None, description="that its weights are stored in")
    baseline_device: str | None = None
    seed: int
    harness: str = Field(description="e.g. lm-eval 0.4.13")
    tasks: list[TaskResult] = []
    texts: list[TextResult] = []
    contamination: list[Contamination] = []
    contamination_allowed: bool = Field(default=False, description="the gate was told to let it pass")
    verdict: Verdict
    seconds: float

    @property
    def differing(self) -> list[str]:
        """How the baseline was run, as far as it is not how the compressed model was: one entry each."""
        runs = ("dtype", self.baseline_dtype, self.dtype), ("device", self.baseline_device, self.device)
        return [f"{what}: base {base}, compressed {ours}" for what, base, ours in runs if base not in (None, ours)]
