"""RunReport: everything the model card may say, and nothing that was not measured.

Each stage adds its own part; the card is drawn from the file on disk and from nothing else. Every key says who writes
it; a part that was not run is absent (None or an empty list), never a made-up default. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from llmcompress.errors import LLMCompressError
from llmcompress.report.part import Part as Part
from llmcompress.report.training import AdapterModule as AdapterModule
from llmcompress.report.training import CurvePoint as CurvePoint
from llmcompress.report.training import Distillation as Distillation
from llmcompress.report.training import Finetune as Finetune
from llmcompress.report.training import Merge as Merge
from llmcompress.report.training import MergedAdapter as MergedAdapter
from llmcompress.report.training import MergedLinear as MergedLinear
from llmcompress.report.training import RejectedRows as RejectedRows
from llmcompress.report.training import Survival as Survival
from llmcompress.report.training import SurvivalRow as SurvivalRow
from llmcompress.report.training import Training as Training
from llmcompress.report.training import TrainingData as TrainingData

FOLDER = "llmcompress"
FILE = "report.json"
VERSION = 1
PLAIN, ADAPTER = "plain", "peft"
"""Output.format of a checkpoint without quantized weights, and of an adapter's folder."""

OF_THE_OUTPUT = {
    "version", "created", "recipe", "seed", "environment", "stages",
    "calibration", "survival", "linears", "output", "checks", "evaluations",
}  # fmt: skip
"""Parts of a report that speak of one run or one output folder; all others are handed on to the next stage."""

Verdict = Literal["pass", "fail", "inconclusive"]
Kernels = Literal["plain", "native", "dequantized"]
"""Whose arithmetic a figure rests on: transformers on plain weights, the layout's own package, or our reading."""


class Source(Part):
    """The checkpoint that went in. Written by quantize."""

    name: str = Field(description="as the user gave it: a folder or a Hub id")
    hub_id: str | None = Field(description="only when it came from the Hub; a card never shows a local path")
    revision: str | None = Field(description="commit of the Hub revision")
    identity: str = Field(description="sha256 over config.json and the tensor bytes of the checkpoint")
    architecture: str
    dtype: str = Field(description="of most of the weights, e.g. bfloat16")
    num_parameters: int = Field(description="tied weights once")
    weights_bytes: int
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: list[str] = []
    pipeline_tag: str | None = None


class LinearRow(Part):
    """One linear. Written by quantize; a linear left alone has outcome skipped and a reason."""

    name: str = Field(description="module path, e.g. model.layers.0.mlp.down_proj")
    shape: tuple[int, int] = Field(description="out_features, in_features")
    scheme: str | None = Field(description="WeightScheme.label(); None when skipped")
    grid: dict[str, int | bool | str | None] | None = Field(default=None, description="the fields of that WeightScheme")
    stem: str | None = Field(default=None, description="what the packed tensors' names begin with")
    method: str | None
    outcome: Literal["quantized", "fell_back", "skipped"]
    reason: str | None = Field(default=None, description="why it fell back or was skipped")
    relative_error: float | None = Field(
        default=None, description="||(W-Q)X||^2 / ||WX||^2 over the calibration tokens; ||W-Q||^2/||W||^2 without any"
    )
    error_kind: Literal["output", "weight"] | None = None
    version: Literal["plain", "refined", "aimed"] = Field(
        default="plain", description="the method's own solution, its refinement, or one aimed at the original's output"
    )
    held_out_error: float | None = Field(
        default=None, description="relative output error on calibration tokens kept from the solver"
    )
    plain_held_out_error: float | None = Field(
        default=None, description="the same of the plain version; another is kept only where it lowers it"
    )
    num_tokens: int | None = Field(default=None, description="calibration tokens that reached this linear")
    digest: str | None = Field(default=None, description="sha256 of codes, scales and zero points, before packing")
    notes: list[str] = []


class Calibration(Part):
    """The text that Hessians were taken from. Written by quantize; absent for data-free methods."""

    name: str
    source: str = Field(description="file name or dataset id and revision")
    licence: str | None = None
    num_samples: int
    seq_len: int
    num_tokens: int = Field(description="real tokens, padding not counted")
    chat_template: bool
    seed: int
    sha256: str = Field(description="of the token ids and the mask")


class Work(Part):
    """How the layers were quantized, where the time went, and how much of the machine was used. Written by quantize."""

    form: Literal["staged", "recomputed"] = Field(
        description="staged: every linear ran once a batch; recomputed: batches ran up to each anew, to save memory"
    )
    activations: Literal["memory", "disk"] = Field(description="where hidden states lay between layers")
    reason: str | None = Field(default=None, description="why not staged and in memory")
    num_processes: int = 1
    num_worse: int = Field(default=0, description="linears whose held-out error is above that of the plain version")
    seconds: dict[str, float] = Field(description="by phase, each without what runs inside it as another phase")
    flops: dict[str, float] = Field(description="by phase, the least that the work takes; of this process")
    ideal_flops_per_s: float = Field(description="of a large float32 matrix product on this machine")


class Tuning(Part):
    """Codes and scales tuned end to end. Written by quantize with effort max."""

    num_steps: int
    num_scales: int
    num_codes: int = 0
    num_codes_changed: int = Field(0, description="of num_codes, by tuning; counted also where it was not kept")
    num_held_out_tokens: int
    held_out_kl_before: float = Field(description="nats per token, on calibration rows that were not trained on")
    held_out_kl_after: float = Field(description="the same with what was tuned as the file holds them")
    kept: bool = Field(description="whether what was tuned is in the checkpoint: only where they are better")


class Output(Part):
    """The checkpoint that came out. Written by quantize."""

    format: str
    files: dict[str, int] = Field(description="file name -> bytes, weights and index only")
    digests: dict[str, str] = Field(description="file name -> sha256")
    weights_bytes: int
    bits_per_weight: float = Field(
        description="of the quantized linears: codes, scales and zero points, over their weights"
    )
    bits_per_weight_model: float = Field(description="of the whole checkpoint")
    quantized_parameters: int
    total_parameters: int


class Check(Part):
    """One verification. Written by verify."""

    name: str
    passed: bool
    detail: str = Field(description="what was compared, over how much, the figure and the bound")
    ran: bool = Field(
        default=True, description="False: it could not be run here, detail says why; it counts for nothing"
    )


class Finding(Part):
    """One rule of an engine that a checkpoint breaks. Written by check."""

    rule: str
    level: Literal["refuses", "warns", "unknown"]
    detail: str
    source: str = Field(description="where the rule was read")


class EngineVerdict(Part):
    """Whether one engine loads the checkpoint, by the rules of its loader. Written by check."""

    engine: str
    version: str
    loads: bool | None = Field(description="None: the layout was not looked into in this engine")
    needs: list[str] = Field(default=[], description="packages beside the engine itself")
    findings: list[Finding] = []


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


class TextFigure(Part):
    """One metric on one held-out text. Written by evaluate for every metric that it knows, all alike."""

    metric: str = Field(description="its name, e.g. kl")
    label: str
    unit: str
    baseline: float | None = Field(default=None, description="of the baseline alone, where it is a figure of one model")
    compressed: float | None = None
    value: float = Field(description="of the pair: a ratio, a divergence, an agreement")
    interval: tuple[float, float] = Field(description="95% paired bootstrap over rows, of value")
    same: float = Field(description="value of two equal models")
    higher_is_better: bool = False
    budget: float | None = Field(default=None, description="largest loss that the suite accepts")
    verdict: Verdict | None = Field(default=None, description="None: it has no budget")


class TextResult(Part):
    """One held-out text through both models, per token. Written by evaluate."""

    name: str
    num_tokens: int
    seq_len: int
    metrics: list[TextFigure]
    shared_entries: int | None = Field(
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


class Speed(Part):
    """How fast one of the two models ran, in a process of its own. Written by measure."""

    model: Literal["baseline", "compressed"]
    engine: str
    engine_note: str
    kernels: Kernels = "native"
    device: str
    dtype: str
    load_s: float = Field(description="from the start of loading to the first token computed")
    prefill_tokens_per_s: list[float] = Field(description="one figure a round")
    decode_tokens_per_s: list[float] = Field(description="one figure a round")
    memory_before_bytes: int = Field(description="of the process, libraries imported and nothing loaded")
    peak_memory_bytes: int = Field(description="highest memory of the process; on a GPU that of its allocator")


class Measurement(Part):
    """Both models' speed, their rounds taken in turn on one machine. Written by measure."""

    baseline: str = Field(description="identity of the baseline checkpoint")
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    num_threads: int
    hardware: str
    rows: list[Speed]


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


class StageRow(Part):
    """One stage that ran. Written by run."""

    name: str
    key: str = Field(description="hash of inputs, settings and code version")
    status: Literal["done", "failed", "reused"]
    seconds: float
    peak_memory_bytes: int = Field(description="highest resident memory of the process so far")
    error: str | None = None


class Environment(Part):
    """Where it ran. Written by run."""

    llmcompress: str
    python: str
    libraries: dict[str, str]
    platform: str
    processor: str
    num_threads: int
    accelerator: str | None = None


class RunReport(Part):
    """The evidence of one run; see the module's docstring."""

    version: int = VERSION
    created: str = Field(description="UTC, ISO 8601")
    recipe: dict[str, Any] = Field(description="every value, defaults included")
    seed: int
    environment: Environment
    stages: list[StageRow] = []
    source: Source | None = None
    finetune: Finetune | None = None
    merge: Merge | None = None
    survival: Survival | None = None
    calibration: Calibration | None = None
    linears: list[LinearRow] = []
    tuning: Tuning | None = None
    output: Output | None = None
    work: Work | None = None
    distillation: Distillation | None = None
    checks: list[Check] = []
    engines: list[EngineVerdict] = []
    evaluations: list[Evaluation] = []
    speed: Measurement | None = None
    notes: list[str] = Field(default=[], description="anything else that a reader must know")

    def save(self, checkpoint: Path) -> Path:
        """Write `checkpoint`/llmcompress/report.json, whole or not at all; returns its path."""
        path = checkpoint / FOLDER / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)
        return path

    @classmethod
    def load(cls, checkpoint: Path) -> RunReport:
        """Read the report of an output folder.

        Raises: LLMCompressError when there is none, or it is not of this version.
        """
        path = checkpoint / FOLDER / FILE
        if not path.is_file():
            raise LLMCompressError(f"{path}: not found", "only a folder that llmcompress wrote has a report")
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise LLMCompressError(f"{path}: not a report of this version ({first})") from error
