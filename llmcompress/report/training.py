"""The parts of the report that speak of training: the data, the run of the trainer, adapters and what became of
them, and what was distilled from what.

report.py gathers them with the others; who reads a report imports them from there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from llmcompress.report.part import Part


class RejectedRows(Part):
    """Rows of training data that were not used, for one reason."""

    reason: str
    count: int
    places: list[str] = Field(description="file:line of the first few")


class TrainingData(Part):
    """The text that was trained on. Written by finetune and distill."""

    source: str = Field(description="file name, or dataset id")
    sha256: str = Field(description="of the files' bytes")
    kind: Literal["text", "prompt", "instruction", "chat"]
    chat_template: bool
    loss_on: Literal["completion", "all"]
    seq_len: int
    packing: bool
    num_examples: int = Field(description="examples trained on")
    num_rows: int = Field(description="rows that they were laid into")
    num_heldout: int
    num_tokens: int = Field(description="of the examples trained on")
    num_learned: int = Field(description="tokens among them that are learned")
    heldout_also_trained: int = Field(description="held-out examples that are also trained on, token for token")
    rejected: list[RejectedRows] = []


class CurvePoint(Part):
    """The training loss at a step, or the mean since the point before."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float | None = None


class Training(Part):
    """One run of the trainer. Written by finetune and distill."""

    steps: int
    epochs: float
    effective_batch: int = Field(description="rows per optimizer step, over all processes")
    trained_parameters: int
    resumed_from: int | None = Field(default=None, description="step of the checkpoint that an interrupted run left")
    seconds: float = Field(description="of the last start; less than the whole where it was resumed")
    num_processes: int = 1
    curve: list[CurvePoint] = []


class AdapterModule(Part):
    """One adapted linear. Written by finetune."""

    name: str
    shape: tuple[int, int] = Field(description="out_features, in_features")
    rank: int = Field(description="at the end of the training")


class Finetune(Part):
    """An adapter and how it was trained. Written by finetune."""

    adapter: Literal["lora", "qlora", "adalora"]
    base: str = Field(description="the checkpoint that it was trained on, as the recipe names it")
    base_identity: str = Field(description="sha256 over config.json and the tensor bytes of that checkpoint")
    base_weights: Literal["full", "nf4", "stored nf4"] = Field(description="how its linears were held in training")
    double_quant: bool = False
    kept_full: dict[str, str] = Field(default={}, description="linear of an NF4 base in full precision -> why")
    compute_dtype: str
    init: Literal["default", "loftq", "residual"]
    rank: int = Field(description="of every linear; for adalora the average that was asked for")
    initial_rank: int | None = Field(default=None, description="adalora: of every linear at the start")
    alpha: float
    dropout: float
    dora: bool
    rslora: bool
    modules: list[AdapterModule]
    data: TrainingData
    data_path: str = Field(description="where the data lay, for measurements that come later")
    training: Training
    learning_rate: float
    heldout_tokens: int = Field(description="learned tokens of the held-out rows")
    heldout_loss_base: float | None = Field(description="nats per token of the base as it was trained on")
    heldout_loss_start: float | None = Field(description="with the adapter before the first step")
    heldout_loss: float | None = Field(description="with the trained adapter")

    def average_rank(self) -> float:
        """Mean over the adapted linears."""
        return sum(one.rank for one in self.modules) / len(self.modules)


class MergedLinear(Part):
    """One linear that an update went into. Written by merge."""

    name: str
    rank: int = Field(description="sum over the adapters")
    relative_update: float = Field(description="||D|| / ||W||")
    excess: float = Field(description="difference of outputs from base plus adapter, over what rounding allows")


class MergedAdapter(Part):
    """One adapter that went in. Written by merge."""

    path: str
    weight: float
    kind: Literal["LORA", "ADALORA"]
    dora: bool
    sha256: str = Field(description="of adapter_model.safetensors")
    base_is_this: bool | None = Field(description="trained on the very checkpoint merged onto; None: not known")


class Merge(Part):
    """Adapters merged into weights. Written by merge."""

    onto: Literal["dequantized", "original"]
    adapters: list[MergedAdapter]
    linears: list[MergedLinear]
    round_tripped: int = Field(description="linears that hold NF4 values, updated or not")
    replaced: list[str] = Field(default=[], description="parameters that an adapter brought whole")
    data: dict[str, Any] | None = Field(default=None, description="settings of the rows measured on")
    heldout_tokens: int = 0
    kl_dequantized: float | None = Field(default=None, description="KL(base + adapter || merged onto NF4 values)")
    kl_original: float | None = Field(default=None, description="KL(base + adapter || merged onto the original)")
    closer: Literal["dequantized", "original"] | None = None
    not_measured: str | None = Field(default=None, description="why there is no KL, or only one")


class SurvivalRow(Part):
    """How much of an update quantization kept in one linear: <Q(W+D) - Q(W), D> / <D, D>."""

    name: str
    kept: float = Field(description="with the method of the run")
    kept_rtn: float = Field(description="with plain rounding on the same grid")


class Survival(Part):
    """What quantizing left of the adapter. Written when a quantize stage follows a merge."""

    linears: list[SurvivalRow]
    kept: float = Field(description="over all linears, each weighted by ||D||^2")
    kept_rtn: float
    heldout_tokens: int
    kl: float | None = Field(description="KL(base + adapter || merged and quantized), nats per token")
    kl_rtn: float | None = Field(description="the same for plain rounding of the merged weights")


class DistillTeacher(Part):
    """One teacher."""

    name: str = Field(description="as the user gave it: a folder or a Hub id")
    hub_id: str | None = None
    identity: str
    architecture: str | None = Field(default=None, description="None where only its cached predictions were at hand")
    num_parameters: int | None = None
    share: float = Field(description="its weight over the sum of all weights")


class DistillScore(Part):
    """A figure on held-out rows; None where it was not measured or makes no sense."""

    metric: str
    higher_is_better: bool
    teacher: float | None
    before: float | None = Field(description="of the student before training")
    after: float | None = Field(description="of the student as it was written and loaded again")


class CachedPredictions(Part):
    """What was kept of the teachers' predictions in the place of the teachers themselves."""

    key: str
    num_kept: int = Field(description="likeliest tokens kept of each distribution; the mass of all others is exact")
    mean_rest: float = Field(description="mass outside them, mean over the tokens that count")
    largest_rest: float
    reused: bool = Field(description="it was there already")


class GridTraining(Part):
    """A student that was quantized before it was trained."""

    rank: int
    num_linears: int
    changed_codes_frac: float = Field(description="share of its codes that training changed")


class OnPolicy(Part):
    """Training on text that the student wrote itself. Counts are of this process, over the whole run."""

    lmbda: float = Field(description="probability that a batch is the student's own text")
    max_new_tokens: int
    sampling_temperature: float
    batches: int
    own_batches: int = Field(description="those among them that the student wrote")
    own_tokens: int = Field(description="that it wrote")


class Distillation(Part):
    """What was distilled from what. Written by distill."""

    kind: Literal["causal", "masked", "classification", "embedding"]
    teachers: list[DistillTeacher]
    combine: Literal["probabilities", "logits"]
    student: str = Field(description="where the student came from and what of it was kept, in one line")
    student_parameters: int
    losses: dict[str, float]
    temperature: float
    beta: float | None = Field(default=None, description="of js")
    layer_maps: list[str] = Field(default=[], description="student:teacher pairs, one map per teacher")
    projection_parameters: int = Field(default=0, description="learned, used in training alone and thrown away")
    phase_frac: float = 0.0
    cache: CachedPredictions | None = None
    on_policy: OnPolicy | None = None
    grid: GridTraining | None = None
    num_heldout: int = Field(description="held-out predictions (of embeddings: texts) that the scores are means over")
    scores: list[DistillScore]
    teacher_rows_per_s: float | None = Field(
        default=None, description="forward passes over held-out rows, in turn with the student"
    )
    student_rows_per_s: float | None = None
    data: TrainingData
    training: Training
    notes: list[str] = []
