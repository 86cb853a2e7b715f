"""What a user may ask of distillation. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from llmcompress.config.options import option
from llmcompress.data.settings import DataSettings, as_data
from llmcompress.distill.layer_map import parse
from llmcompress.errors import LLMCompressError
from llmcompress.training.settings import TrainingSettings

STUDENT, TEACHER, LOSS, POLICY = "Student", "Teachers", "Losses", "On-policy"
"""Headings of the options in `--help`."""
LossName = Literal[
    "forward_kl", "reverse_kl", "js", "ce", "sentence",
    "hidden_mse", "hidden_cosine", "attention_kl", "attention_mse", "embedding",
]  # fmt: skip
HIDDEN, ATTENTION = ("hidden_mse", "hidden_cosine", "embedding"), ("attention_kl", "attention_mse")
INTERMEDIATE = (*HIDDEN, *ATTENTION)
"""Losses of what lies inside a model: its hidden states and its attention probabilities."""
NOT_CACHED = ("sentence", *INTERMEDIATE)
"""Losses that need more of a teacher than its predictions."""


class TeacherRef(BaseModel):
    """A further teacher, and its weight beside the others'."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="folder, Hub id or bundled/NAME")
    weight: float = Field(1.0, ge=0)


class AdapterSettings(BaseModel):
    """How a quantized student is trained: low-rank factors on weights that stay on their grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = option(16, "Rank of the adapters on a quantized student.", group=STUDENT, metavar="R", ge=1)


class OnPolicySettings(BaseModel):
    """Training on text that the student writes itself (GKD)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lmbda: float = option(
        0.5, "Share of the batches that the student writes itself (GKD).", group=POLICY, metavar="SHARE", gt=0, le=1
    )
    max_new_tokens: int = option(64, "Tokens that the student writes at most.", group=POLICY, metavar="N", ge=1)
    prompt_tokens: int = option(16, "Tokens of a plain text that it continues.", group=POLICY, metavar="N", ge=1)
    sampling_temperature: float = option(
        1.0, "Temperature that the student samples at.", group=POLICY, metavar="T", gt=0, allow_inf_nan=False
    )


def _weights(value: Any) -> Any:
    """`forward_kl` and `[forward_kl=1, hidden_mse=0.5]` as a mapping."""
    pieces = value.split(",") if isinstance(value, str) else value
    if not isinstance(pieces, list):
        return value
    split = [str(piece).partition("=") for piece in pieces]
    return {name.strip(): weight or 1.0 for name, _, weight in split}


def _references(value: Any) -> Any:
    return (
        [{"model": entry} if isinstance(entry, str) else entry for entry in value] if isinstance(value, list) else value
    )


def _integers(value: Any) -> Any:
    return [piece for piece in value.split(",") if piece] if isinstance(value, str) else value


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class DistillSettings(BaseModel):
    """The distill stage. The checkpoint that goes in is the (first) teacher; the student comes out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: str | None = option(
        None, "Student: a checkpoint or a config.json. [default: cut from the teacher]", group=STUDENT, metavar="MODEL"
    )
    keep: Share | None = option(None, "Share of the teacher's layers, evenly spaced.", group=STUDENT, metavar="SHARE")
    layers: Annotated[list[int], BeforeValidator(_integers)] = option(
        [], "Indices of the teacher's layers to keep, such as 0,2,4.",
        group=STUDENT, flag="--student-layers", metavar="I,J,…",
    )  # fmt: skip
    keep_units: Share | None = option(
        None, "Share of the feed-forward units, those that contribute most.", group=STUDENT, metavar="SHARE"
    )
    keep_heads: Share | None = option(
        None, "Share of the attention heads, in whole key-value groups.", group=STUDENT, metavar="SHARE"
    )
    importance_rows: int = option(
        64, "Training rows that contributions are measured on.", group=STUDENT, metavar="N", ge=1
    )
    adapter: AdapterSettings = AdapterSettings()

    weight: float = option(1.0, "Weight of the first teacher.", hidden=True, ge=0)
    teachers: Annotated[list[TeacherRef], BeforeValidator(_references)] = option(
        [], "Further teachers with their weights.", hidden=True
    )
    combine: Literal["probabilities", "logits"] = option(
        "probabilities", "What is averaged over several teachers.", group=TEACHER
    )
    cache: str | None = option(
        None, "Folder for the teachers' predictions; filled where it is empty.", group=TEACHER, metavar="DIR"
    )
    refill_cache: bool = option(
        False, "Cache filled anew where another teacher or other data filled it.", group=TEACHER
    )
    cache_tokens: int = option(64, "Top-k of the cached distributions.", group=TEACHER, metavar="K", ge=1)
    one_at_a_time: bool = option(False, "Never two teachers in memory; they fill the cache in turn.", group=TEACHER)

    losses: Annotated[dict[LossName, Weight], BeforeValidator(_weights)] = option(
        {}, "Loss and its weight; repeatable. [default: forward_kl, for sentence encoders sentence]",
        group=LOSS, flag="--loss", metavar="NAME=W", choices=lambda: get_args(LossName),
    )  # fmt: skip
    temperature: float = option(
        1.0, "Temperature of both distributions.", group=LOSS, metavar="T", gt=0, allow_inf_nan=False
    )
    beta: float = option(0.5, "Loss js: weight of the teacher in the mixture.", group=LOSS, metavar="BETA", gt=0, lt=1)
    layer_map: str = option(
        "uniform", "Pairing of hidden states: uniform, last, final, or student:teacher pairs such as 0:1,1:3.",
        group=LOSS, metavar="MAP",
    )  # fmt: skip
    projection: Literal["learned", "none"] = option(
        "learned", "Projection between hidden states of different widths.", group=LOSS
    )
    phase_frac: float = option(
        0.0, "Share of the steps, the first, on hidden-state losses alone; prediction losses come after.",
        group=LOSS, metavar="SHARE", ge=0, lt=1,
    )  # fmt: skip
    masked_frac: float = option(
        0.15, "Masked language models: share of the tokens to predict.", group=LOSS, metavar="SHARE", gt=0, lt=1
    )

    on_policy: OnPolicySettings | None = None
    data: Annotated[DataSettings, BeforeValidator(as_data)]
    training: TrainingSettings = TrainingSettings()

    @field_validator("layer_map")
    @classmethod
    def _a_map(cls, value: str) -> str:
        try:
            parse(value)
        except LLMCompressError as error:
            raise ValueError(error.message.removeprefix("layer_map ")) from error
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> DistillSettings:
        shape = {"keep": self.keep, "layers": self.layers, "keep_units": self.keep_units, "keep_heads": self.keep_heads}
        asked = [name for name, value in shape.items() if value not in (None, [])]
        if self.student is not None and asked:
            raise ValueError(f"a student is given, so there is nothing to cut ({', '.join(asked)})")
        if self.keep is not None and self.layers:
            raise ValueError("keep and layers both say which layers stay")
        if self.weight + sum(teacher.weight for teacher in self.teachers) == 0:
            raise ValueError("every teacher has weight 0")
        if self.losses and not any(self.losses.values()):
            raise ValueError("every loss has weight 0")
        if self.one_at_a_time and self.cache is None:
            raise ValueError("one_at_a_time needs a cache: the folder where the teachers' predictions are kept")
        if self.refill_cache and self.cache is None:
            raise ValueError("refill_cache needs a cache")
        intermediate = sorted(name for name, weight in self.losses.items() if weight and name in NOT_CACHED)
        if self.cache is not None and intermediate:
            raise ValueError(f"a cache holds predictions only; {', '.join(intermediate)} need the teacher itself")
        if self.on_policy is not None:
            self._can_be_on_policy(intermediate)
        if self.phase_frac and not (intermediate and set(self.losses) - set(NOT_CACHED)):
            raise ValueError("phase_frac needs losses of both kinds: of hidden states or attention, and of predictions")
        return self

    def _can_be_on_policy(self, intermediate: Sequence[str]) -> None:
        if self.cache is not None:
            raise ValueError("on_policy: a cache holds predictions on the data's text, not on what the student writes")
        if intermediate:
            raise ValueError(f"on_policy: matches predictions alone, not {', '.join(intermediate)}")
        if self.losses.get("ce"):
            raise ValueError("on_policy: what the student writes has no labels, so ce cannot be learned from it")
