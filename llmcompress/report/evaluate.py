"""One suite: both models on the same items and texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.report.part import Part

Verdict = Literal["pass", "fail", "inconclusive"]
Kernels = Literal["native", "dequantized"]
"""Whose arithmetic a figure rests on: the engine's own, or dense weights that llmcompress unpacked."""


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
    interval: tuple[float, float] = Field(description="95% paired bootstrap")
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


class TextResult(Part):
    """Held-out text: perplexity of both and the divergence between them, per token. Written by evaluate."""

    name: str
    num_tokens: int
    seq_len: int
    tokens_sha256: str | None = Field(default=None, description="of the token ids")
    baseline_perplexity: float
    compressed_perplexity: float
    perplexity_ratio_interval: tuple[float, float] = Field(description="95% paired bootstrap over rows")
    kl: float = Field(description="mean KL(baseline || compressed) of the next-token distribution, nats per token")
    kl_interval: tuple[float, float]
    top1_agreement: float = Field(description="share of positions where both rank the same token first")
    shared_entries: int | None = Field(
        default=None, description="entries of the vocabulary compared, where the models differ in padding rows"
    )
    budget_kl: float | None = None
    budget_perplexity_ratio: float | None = None
    verdict: Verdict


class Overlap(Part):
    """What a text that made the checkpoint shares with a part of the suite. Written by evaluate."""

    text: str = Field(description="what it was made with, e.g. calibration set tiny")
    part: str = Field(description="task or text of the suite; * for all of them")
    num_items: int = 0
    num_short: int = Field(default=0, description="items too short to judge")
    num_found: int = Field(default=0, description="items that share a run of 13 words (all of them, from 8 words on)")
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
    seed: int
    harness: str = Field(description="e.g. lm-eval 0.4.13")
    tasks: list[TaskResult] = []
    texts: list[TextResult] = []
    overlaps: list[Overlap] = []
    overlap_allowed: bool = Field(default=False, description="the gate was told to let it pass")
    verdict: Verdict
    seconds: float
