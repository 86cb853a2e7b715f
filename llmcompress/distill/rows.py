"""Training rows for every task, and the batches they make.

    causal          as fine-tuning reads them (data/examples.py): answers trained, prompts not
    masked          {"text": …} or {"sentence": …}; of the tokens to be predicted (15 %), 80 % become the mask token,
                    10 % a random one, 10 % stay (BERT). Drawn once per row, so that a cache fits
    classification  {"sentence": …, "label": 0}      "text" for "sentence"; two texts: sentence1 and sentence2
    embedding       {"text": …} or {"sentence": …}

Every row carries its number, by which a cache finds the teacher's predictions for it.

Shapes: B rows of a batch, S tokens of the longest of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmcompress.data.collate import IGNORED, Example, collate, labels_of, padding_token
from llmcompress.data.examples import load_examples, reasons, split_heldout, summarize
from llmcompress.data.settings import DataSettings
from llmcompress.data.sources import RejectedRow, read_rows
from llmcompress.data.sources import Row as SourceRow
from llmcompress.errors import LLMCompressError
from llmcompress.models.tasks import CAUSAL, Task
from llmcompress.report import TrainingData
from llmcompress.seed import derive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

FEWEST_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One row. labels: per token, or one class, or None. example: the row as fine-tuning has it, for a causal model."""

    number: int
    ids: list[int]
    labels: list[int] | int | None
    types: list[int] | None = None
    example: Example | None = None


@dataclass(frozen=True)
class Rows:
    """Rows to train on and rows held out; `padding` fills up a batch."""

    task: Task
    train: list[Row]
    heldout: list[Row]
    padding: int
    summary: TrainingData

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The arguments of the model's forward for some rows, with `labels` and `row` (their numbers, [B])."""
        import torch

        numbers = {"row": torch.tensor([row.number for row in rows])}
        if self.task is CAUSAL:
            return collate([row.example for row in rows if row.example is not None], self.padding) | numbers
        longest = max(len(row.ids) for row in rows)

        def filled(values: Callable[[Row], list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[*values(row), *[fill] * (longest - len(row.ids))] for row in rows])

        inputs = {
            "input_ids": filled(lambda row: row.ids, self.padding),
            "attention_mask": filled(lambda row: [1] * len(row.ids), 0),
        }
        if any(row.types and any(row.types) for row in rows):
            inputs["token_type_ids"] = filled(lambda row: row.types or [0] * len(row.ids), 0)
        if self.task.name == "masked":
            inputs["labels"] = filled(lambda row: list(row.labels) if isinstance(row.labels, list) else [], IGNORED)
        elif self.task.name == "classification":
            inputs["labels"] = torch.tensor([row.labels if isinstance(row.labels, int) else IGNORED for row in rows])
        return inputs | numbers

    def digest(self, rows: Sequence[Row]) -> str:
        """sha256 over some rows' tokens and labels: what a cache of predictions depends on."""
        content = [[row.ids, row.types, row.labels, row.example.lengths if row.example else []] for row in rows]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, task: Task, masked_frac: float, seed: int
) -> Rows:
    """Read, tokenize and split the data for a model of this task; the same everything gives the same rows.

    Raises: LLMCompressError for what is wrong with the file as a whole, and where no row can be used.
    """
    padding = padding_token(tokenizer)
    if task is CAUSAL:
        examples = load_examples(settings, tokenizer, seed)
        train, heldout = (
            [Row(number, example.ids, labels_of(example), None, example) for number, example in enumerate(part)]
            for part in (examples.train, examples.heldout)
        )
        return Rows(task, train, heldout, padding, examples.summary)
    rejected: list[RejectedRow] = []

    def read(path: str, *of_dataset: Any) -> list[Row]:
        rows, bad = read_rows(path, *of_dataset)
        rejected.extend(bad)
        return _encoded(rows[: settings.max_rows], settings, tokenizer, task, rejected)

    train = read(settings.path, settings.config, settings.split, settings.revision)
    if settings.heldout is not None:
        heldout = read(settings.heldout)
    else:
        train, heldout = split_heldout(train, settings.heldout_frac, seed)
    if not train:
        raise LLMCompressError(f"{settings.path}: no usable row ({reasons(rejected)})", f"a row is {task.row}")
    if task.name == "masked":
        mask = _masker(tokenizer, masked_frac, derive(seed, "masking"), settings.path)
        train, heldout = ([mask(row) for row in part] for part in (train, heldout))
    train, heldout = ([replace(row, number=number) for number, row in enumerate(part)] for part in (train, heldout))
    summary = summarize(
        settings,
        [row.ids for row in train],
        [row.ids for row in heldout],
        rejected,
        kind="text",
        chat_template=False,
        loss_on="all",
        packing=False,
        num_loss_tokens=sum(
            sum(label != IGNORED for label in row.labels) for row in train if isinstance(row.labels, list)
        ),
    )
    return Rows(task, train, heldout, padding, summary)


def _encoded(
    source_rows: Sequence[SourceRow], settings: DataSettings, tokenizer: PreTrainedTokenizerBase, task: Task,
    rejected: list[RejectedRow],
) -> list[Row]:  # fmt: skip
    rows = []
    for source_row in source_rows:
        fields = source_row.fields
        label = fields.get("label")
        if isinstance(label, str) and label.strip().isdecimal():  # in a table every cell is a text
            label = int(label)
            fields = fields | {"label": label}
        reason = task.unusable(fields)
        if reason is None:
            texts = task.texts(fields)
            encoded = tokenizer(*texts, verbose=False)
            if len(encoded["input_ids"]) > settings.seq_len:
                reason = f"longer than seq_len {settings.seq_len}" if settings.on_too_long == "drop" else None
                encoded = tokenizer(*texts, truncation=True, max_length=settings.seq_len, verbose=False)
            reason = "no token" if len(encoded["input_ids"]) < FEWEST_TOKENS else reason
        if reason is not None:
            rejected.append(RejectedRow(source_row.where, reason))
            continue
        types = encoded.get("token_type_ids")
        rows.append(
            Row(
                0,
                list(encoded["input_ids"]),
                label if task.name == "classification" else None,
                list(types) if types is not None else None,
            )
        )
    return rows


def _masker(tokenizer: PreTrainedTokenizerBase, share: float, seed: int, where: str) -> Callable[[Row], Row]:
    """BERT's masking: what is predicted, and what stands in its place. At least one token of every row."""
    import random

    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        raise LLMCompressError(
            f"{where}: the tokenizer of this checkpoint has no mask token", "a masked model needs one"
        )
    special, generator = set(tokenizer.all_special_ids), random.Random(seed)
    num_tokens = len(tokenizer)

    def mask(row: Row) -> Row:
        candidates = [place for place, token in enumerate(row.ids) if token not in special] or [0]
        chosen = generator.sample(candidates, max(1, round(share * len(candidates))))
        ids, labels = list(row.ids), [IGNORED] * len(row.ids)
        for place in chosen:
            labels[place] = row.ids[place]
            drawn = generator.random()
            if drawn < 0.8:
                ids[place] = int(mask_id)
            elif drawn < 0.9:
                ids[place] = generator.randrange(num_tokens)
        return replace(row, ids=ids, labels=labels)

    return mask
