"""What a user may ask of distillation. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from llmcompress.data.settings import DataSettings, as_data
from llmcompress.distill.layer_map import parse
from llmcompress.errors import LLMCompressError
from llmcompress.training.settings import TrainingSettings

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

    rank: int = Field(16, ge=1)


class OnPolicySettings(BaseModel):
    """Training on text that the student writes itself (GKD)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lmbda: float = Field(0.5, gt=0, le=1, description="share of the batches that are the student's own text")
    max_new_tokens: int = Field(64, ge=1, description="that it writes at most")
    prompt_tokens: int = Field(16, ge=1, description="of a plain text, from which it goes on")
    sampling_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)


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

    data: Annotated[DataSettings, BeforeValidator(as_data)]
    training: TrainingSettings = TrainingSettings()

    student: str | None = Field(None, description="checkpoint, or a config.json; None: cut from the teacher")
    keep: Share | None = Field(None, description="share of the teacher's layers, evenly spaced")
    layers: Annotated[list[int], BeforeValidator(_integers)] = Field([], description="which of the teacher's layers")
    keep_units: Share | None = Field(None, description="share of the feed-forward units, those that contribute most")
    keep_heads: Share | None = Field(None, description="share of the heads, in whole key-value groups")
    importance_rows: int = Field(64, ge=1, description="training rows that contributions are measured on")
    adapter: AdapterSettings = AdapterSettings()

    weight: float = Field(1.0, ge=0, description="of the first teacher beside the others")
    teachers: Annotated[list[TeacherRef], BeforeValidator(_references)] = Field([], description="further teachers")
    combine: Literal["probabilities", "logits"] = Field("probabilities", description="what is averaged over teachers")

    losses: Annotated[dict[LossName, Weight], BeforeValidator(_weights)] = Field(
        {}, description="loss -> weight; empty: forward_kl, or sentence for sentence encoders"
    )
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="of both distributions")
    beta: float = Field(0.5, gt=0, lt=1, description="of js: the teacher's part in the mixture")
    layer_map: str = Field("uniform", description="uniform, last, final, or student:teacher pairs such as 0:1,1:3")
    projection: Literal["learned", "none"] = Field("learned", description="where hidden widths differ")
    phase_frac: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the steps, the first, that train on hidden states and attention alone; then predictions",
    )

    on_policy: OnPolicySettings | None = Field(None, description="train on the student's own text; None: on the data's")

    cache: str | None = Field(None, description="folder of cached predictions; filled where they are not there yet")
    refill_cache: bool = Field(False, description="fill it again where it was filled by another teacher or data")
    cache_tokens: int = Field(64, ge=1, description="likeliest tokens kept of every distribution")
    one_at_a_time: bool = Field(False, description="never two teachers in memory: they fill the cache in turn")
    masked_frac: float = Field(0.15, gt=0, lt=1, description="masked-language models: share of tokens to predict")

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
