"""Training rows for every kind of model, and the batches they make.

    causal          as fine-tuning reads them (data/examples.py): answers learned, prompts not
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.data.calibration import shuffled
from llmcompress.data.examples import IGNORED, MOST_NAMED, Example, collate, data_digest, load_examples
from llmcompress.data.records import Record, Rejected, is_file, read_records
from llmcompress.data.settings import DataSettings
from llmcompress.distill.kinds import Kind
from llmcompress.errors import LLMCompressError
from llmcompress.report import RejectedRows, TrainingData
from llmcompress.seed import derive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TEXTS = (("sentence1", "sentence2"), ("sentence",), ("text",))
"""Fields that hold what an encoder reads; the first set that a row has counts."""
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

    kind: Kind
    train: list[Row]
    heldout: list[Row]
    padding: int
    summary: TrainingData

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The arguments of the model's forward for some rows, with `labels` and `row`."""
        return batch(rows, self.kind, self.padding)

    def digest(self, rows: Sequence[Row]) -> str:
        """sha256 over some rows' tokens and labels: what a cache of predictions depends on."""
        told = [[row.ids, row.types, row.labels, row.example.lengths if row.example else []] for row in rows]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def load_rows(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, kind: Kind, masked_frac: float, seed: int
) -> Rows:
    """Read, tokenize and split the data for a model of this kind; the same everything gives the same rows.

    Raises: LLMCompressError for what is wrong with the file as a whole, and where no row can be used.
    """
    padding = next(int(one) for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(one, int))
    if kind == "causal":
        found = load_examples(settings, tokenizer, seed)
        train, heldout = ([_of_example(n, one) for n, one in enumerate(part)] for part in (found.train, found.heldout))
        return Rows(kind, train, heldout, padding, found.summary)
    rejected: list[Rejected] = []

    def read(path: str, *how: Any) -> list[Row]:
        records, bad = read_records(path, *how)
        rejected.extend(bad)
        return _encoded(records[: settings.max_rows], settings, tokenizer, kind, rejected)

    train = read(settings.path, settings.config, settings.split, settings.revision)
    if settings.heldout is not None:
        heldout = read(settings.heldout)
    else:
        train, heldout = _split(train, settings.heldout_frac, derive(seed, "held-out"))
    if not train:
        first = f"{rejected[0].reason}, {rejected[0].where}" if rejected else "it is empty"
        needs = "a row is {sentence or text" + (", label}" if kind == "classification" else "}")
        raise LLMCompressError(f"{settings.path}: no usable row ({first})", needs)
    if kind == "masked":
        mask = _masker(tokenizer, masked_frac, derive(seed, "masking"), settings.path)
        train, heldout = ([mask(row) for row in part] for part in (train, heldout))
    train, heldout = ([_numbered(n, row) for n, row in enumerate(part)] for part in (train, heldout))
    return Rows(kind, train, heldout, padding, _summary(settings, train, heldout, rejected))


def batch(rows: Sequence[Row], kind: Kind, padding: int) -> dict[str, torch.Tensor]:
    """See `Rows.batch`."""
    import torch

    numbers = {"row": torch.tensor([row.number for row in rows])}
    if kind == "causal":
        return collate([row.example for row in rows if row.example is not None], padding) | numbers
    longest = max(len(row.ids) for row in rows)

    def filled(values: Callable[[Row], list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*values(row), *[fill] * (longest - len(row.ids))] for row in rows])

    found = {
        "input_ids": filled(lambda row: row.ids, padding),
        "attention_mask": filled(lambda row: [1] * len(row.ids), 0),
    }
    if any(row.types and any(row.types) for row in rows):
        found["token_type_ids"] = filled(lambda row: row.types or [0] * len(row.ids), 0)
    if kind == "masked":
        found["labels"] = filled(lambda row: list(row.labels) if isinstance(row.labels, list) else [], IGNORED)
    elif kind == "classification":
        found["labels"] = torch.tensor([row.labels if isinstance(row.labels, int) else IGNORED for row in rows])
    return found | numbers


def _of_example(number: int, example: Example) -> Row:
    labels = [one if learn else IGNORED for one, learn in zip(example.ids, example.learned, strict=True)]
    return Row(number, example.ids, labels, None, example)


def _numbered(number: int, row: Row) -> Row:
    return Row(number, row.ids, row.labels, row.types, row.example)


def _encoded(
    records: Sequence[Record], settings: DataSettings, tokenizer: PreTrainedTokenizerBase, kind: Kind,
    rejected: list[Rejected],
) -> list[Row]:  # fmt: skip
    found = []
    for record in records:
        reason = _reason(record.fields, kind)
        if reason is None:
            names = next(names for names in TEXTS if all(name in record.fields for name in names))
            texts = [str(record.fields[name]) for name in names]
            coded = tokenizer(*texts, verbose=False)
            ids, types = list(coded["input_ids"]), coded.get("token_type_ids")
            if len(ids) > settings.seq_len:
                coded = tokenizer(*texts, truncation=True, max_length=settings.seq_len, verbose=False)
                ids, types = list(coded["input_ids"]), coded.get("token_type_ids")
                reason = f"longer than seq_len {settings.seq_len}" if settings.on_too_long == "drop" else None
            reason = "no token" if len(ids) < FEWEST_TOKENS else reason
        if reason is not None:
            rejected.append(Rejected(record.where, reason))
            continue
        label = record.fields["label"] if kind == "classification" else None
        found.append(Row(0, ids, label, list(types) if types is not None else None))
    return found


def _reason(fields: Mapping[str, Any], kind: Kind) -> str | None:
    """Why a row cannot be used, or None."""
    names = next((names for names in TEXTS if all(name in fields for name in names)), None)
    if names is None:
        return "no field 'sentence' or 'text'"
    if not all(isinstance(fields[name], str) and fields[name].strip() for name in names):
        return f"field {names[0]!r} is no text"
    if kind == "classification" and (not isinstance(fields.get("label"), int) or fields["label"] < 0):
        return "no class in field 'label' (0, 1, …)"
    return None


def _split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    if share == 0 or len(rows) < 2:
        return rows, []
    held = set(shuffled(len(rows), seed)[: min(max(1, round(share * len(rows))), len(rows) - 1)])
    return [one for n, one in enumerate(rows) if n not in held], [rows[n] for n in sorted(held)]


def _masker(tokenizer: PreTrainedTokenizerBase, share: float, seed: int, where: str) -> Callable[[Row], Row]:
    """BERT's masking: what is predicted, and what stands in its place. At least one token of every row."""
    import random

    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        raise LLMCompressError(
            f"{where}: the tokenizer of this checkpoint has no mask token", "a masked model needs one"
        )
    special, draw = set(tokenizer.all_special_ids), random.Random(seed)
    size = len(tokenizer)

    def mask(row: Row) -> Row:
        free = [at for at, one in enumerate(row.ids) if one not in special] or [0]
        chosen = draw.sample(free, max(1, round(share * len(free))))
        ids, labels = list(row.ids), [IGNORED] * len(row.ids)
        for at in chosen:
            labels[at] = row.ids[at]
            luck = draw.random()
            ids[at] = int(mask_id) if luck < 0.8 else draw.randrange(size) if luck < 0.9 else row.ids[at]
        return Row(row.number, ids, labels, row.types)

    return mask


def _summary(
    settings: DataSettings, train: Sequence[Row], heldout: Sequence[Row], rejected: Sequence[Rejected]
) -> TrainingData:
    places: dict[str, list[str]] = {}
    for one in rejected:
        places.setdefault(one.reason, []).append(one.where)
    known = {tuple(row.ids) for row in train}
    shown = Path(settings.path).name if is_file(settings.path) else settings.path
    return TrainingData(
        source=shown + (f" at {settings.revision}" if settings.revision else ""),
        sha256=data_digest(settings),
        kind="text",
        chat_template=False,
        loss_on="all",
        seq_len=settings.seq_len,
        packing=False,
        num_examples=len(train),
        num_rows=len(train),
        num_heldout=len(heldout),
        num_tokens=sum(len(row.ids) for row in train),
        num_learned=sum(sum(one != IGNORED for one in row.labels) for row in train if isinstance(row.labels, list)),
        heldout_also_trained=sum(tuple(row.ids) in known for row in heldout),
        rejected=[
            RejectedRows(reason=reason, count=len(where), places=where[:MOST_NAMED]) for reason, where in places.items()
        ],
    )
