"""What a user may say about training data. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["auto", "text", "prompt", "instruction", "chat"]


class DataSettings(BaseModel):
    """Text to train on, and how it is read. `data: file.jsonl` is short for `data: {path: file.jsonl}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, description="a .jsonl, .json or .parquet file, or a dataset id of the Hub")
    config: str | None = Field(None, description="configuration of a Hub dataset")
    split: str = Field("train", description="split of a Hub dataset")
    revision: str | None = Field(None, description="commit, tag or branch of a Hub dataset")
    heldout: str | None = Field(None, description="a file of held-out rows; None: taken out of the data")
    heldout_frac: float = Field(0.1, ge=0, lt=1, description="share of the rows that is held out")
    kind: Kind = Field("auto", description="what a row is: text, prompt, instruction or chat; auto: by its fields")
    chat_template: bool | None = Field(
        None, description="render with the tokenizer's chat template; None: chat and instructions where it has one"
    )
    loss_on: Literal["completion", "all"] = Field("completion", description="which tokens are learned, if a row asks")
    seq_len: int = Field(512, ge=2, description="tokens of a row at most")
    on_too_long: Literal["drop", "cut"] = Field("drop", description="for rows of more tokens; text is always split")
    packing: bool = Field(False, description="several examples in a row, each seeing itself alone")
    max_rows: int | None = Field(None, ge=1, description="read no more rows than these")


def as_data(value: Any) -> Any:
    """The long form of a `data` setting that is only a path."""
    return {"path": value} if isinstance(value, str) else value
