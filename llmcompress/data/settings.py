"""What a user may say about training data. Free of torch, so that recipes and `--help` load at once."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llmcompress.config import options

option = partial(options.option, group="Data")

Kind = Literal["auto", "text", "prompt", "instruction", "chat"]


class DataSettings(BaseModel):
    """Text to train on, and how it is read. `data: file.jsonl` is short for `data: {path: file.jsonl}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = option(
        ..., "Rows: a .jsonl, .json or .parquet file, or a dataset id of the Hub.",
        flag="--data", metavar="DATA", min_length=1,
    )  # fmt: skip
    config: str | None = option(None, "Configuration of a Hub dataset.", flag="--data-config", metavar="NAME")
    split: str = option("train", "Split of a Hub dataset.", flag="--data-split", metavar="NAME")
    revision: str | None = option(
        None, "Commit, tag or branch of a Hub dataset.", flag="--data-revision", metavar="REVISION"
    )
    heldout: str | None = option(None, "File of held-out rows. [default: a share of the data]", metavar="FILE")
    heldout_frac: float = option(0.1, "Share of the rows that is held out.", metavar="SHARE", ge=0, lt=1)
    kind: Kind = option("auto", "Kind of the rows; auto: by their fields.", flag="--data-kind")
    chat_template: bool | None = option(
        None, "Rendering with the tokenizer's chat template. [default: chats and instructions, where it has one]"
    )
    loss_on: Literal["completion", "all"] = option("completion", "Tokens that the loss is taken on.")
    seq_len: int = option(512, "Tokens per row at most.", metavar="N", ge=2)
    on_too_long: Literal["drop", "cut"] = option("drop", "Treatment of longer rows; plain text is always split.")
    packing: bool = option(False, "Several examples per row, each attending to itself alone.")
    max_rows: int | None = option(None, "Rows read at most.", metavar="N", ge=1)


def as_data(value: Any) -> Any:
    """The long form of a `data` setting that is only a path."""
    return {"path": value} if isinstance(value, str) else value
