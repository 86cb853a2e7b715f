"""Training examples: rows of a file as token ids, with what is to be learned marked, split, and laid into rows.

    records ──kinds──> pieces ──tokenizer──> Example(ids, learned) ──split──> training | held out ──pack──> rows
       └── rejected: not JSON, empty, too long, …  each counted, and named by its line

A token is learned when it begins inside a learned piece; the first of an example never is, since nothing precedes it.
Packing lays whole examples end to end, best fit first; position ids start again with each, by which transformers keeps
them from seeing one another.

Shapes: B rows of a batch, S tokens of the longest of them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.data.calibration import shuffled
from llmcompress.data.records import Record, Rejected, is_file, read_records
from llmcompress.data.row_kinds import FIELDS, Piece, UnusableRowError, kind_of, pieces, uses_template
from llmcompress.data.settings import DataSettings
from llmcompress.errors import LLMCompressError
from llmcompress.report import RejectedRows, TrainingData
from llmcompress.seed import derive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learned."""
MOST_NAMED = 10
"""Places that the report names of the rows rejected for one reason."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and which are learned, both of one length; `lengths` of the examples that a packed row holds."""

    where: str
    ids: list[int]
    learned: list[bool]
    lengths: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingSet:
    """Rows to train on and rows held out, with what the report says of them."""

    train: list[Example]
    heldout: list[Example]
    summary: TrainingData


def load_examples(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> TrainingSet:
    """Read, render, tokenize and split the data; the same settings, tokenizer and seed give the same rows.

    Raises: LLMCompressError for what is wrong with the file as a whole, rows of no known kind, and no usable row.
    """
    records, rejected = read_records(settings.path, settings.config, settings.split, settings.revision)
    records = records[: settings.max_rows]
    kind = _kind(settings, records, rejected)
    template = uses_template(kind, settings.chat_template, tokenizer)
    found = _examples(records, kind, template, settings, tokenizer, rejected)
    if settings.heldout is not None:
        more, bad = read_records(settings.heldout)
        rejected += bad
        train, heldout = found, _examples(more, kind, template, settings, tokenizer, rejected)
    else:
        train, heldout = _split(found, settings.heldout_frac, derive(seed, "held-out"))
    if not train or (settings.heldout is not None and not heldout):
        where = settings.path if not train else settings.heldout
        raise LLMCompressError(f"{where}: no usable row ({_reasons(rejected)})", _hint(rejected, settings))
    summary = _summary(settings, kind, template, train, heldout, rejected)
    packed = pack_examples(train, settings.seq_len) if settings.packing else train
    return TrainingSet(packed, heldout, summary.model_copy(update={"num_rows": len(packed)}))


def tokenized(
    parts: Sequence[Piece], special: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Token ids of the pieces as one text, and which tokens begin inside a learned piece.

    special: add bos and eos where the tokenizer does so by itself.
    """
    text = "".join(part for part, _ in parts)
    if not getattr(tokenizer, "is_fast", False):
        ids = [tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part, _ in parts]
        marks = [learn for one, (_, learn) in zip(ids, parts, strict=True) for _ in one]
        first = [tokenizer.bos_token_id] if special and tokenizer.bos_token_id is not None else []
        return _unlearned_first([*first, *chain.from_iterable(ids)], [*[False] * len(first), *marks])
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    marks, bounds, end = [], [], 0
    for part, learn in parts:
        bounds.append((end, end + len(part), learn))
        end += len(part)
    for start, stop in found["offset_mapping"]:
        marks.append(stop > start and any(low <= start < high and learn for low, high, learn in bounds))
    return _unlearned_first(list(found["input_ids"]), marks)


def pack_examples(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """The examples in as few rows of `seq_len` tokens as best fit finds, longest first; none is cut.

    >>> examples = [Example("", [1] * size, [True] * size) for size in (3, 6, 4)]
    >>> [row.lengths for row in pack_examples(examples, 8)]
    [[6], [4, 3]]
    """
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].ids), index))
    room: list[tuple[int, int]] = []
    rows: list[list[int]] = []
    for index in order:
        size = len(examples[index].ids)
        at = bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - size, row))
    return [_joined([examples[index] for index in row]) for row in rows]


def collate(rows: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """A batch: input_ids and labels [B, S] filled up with `padding`, and attention_mask, or position_ids where rows
    are packed (padding then counts as an example of its own, which sees nothing else).
    """
    import torch

    longest = max(len(row.ids) for row in rows)
    fill = [longest - len(row.ids) for row in rows]
    ids = [[*row.ids, *[padding] * more] for row, more in zip(rows, fill, strict=True)]
    labels = [
        [*(one if learn else IGNORED for one, learn in zip(row.ids, row.learned, strict=True)), *[IGNORED] * more]
        for row, more in zip(rows, fill, strict=True)
    ]
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if any(row.lengths for row in rows):
        spans = [[*(row.lengths or [len(row.ids)]), more] for row, more in zip(rows, fill, strict=True)]
        batch["position_ids"] = torch.tensor([list(chain.from_iterable(map(range, one))) for one in spans])
    else:
        masks = [[1] * len(row.ids) + [0] * more for row, more in zip(rows, fill, strict=True)]
        batch["attention_mask"] = torch.tensor(masks)
    return batch


def data_digest(settings: DataSettings) -> str:
    """sha256 over the bytes of the files that the settings name; empty for a Hub dataset.

    Raises: LLMCompressError for a file that is missing.
    """
    sha = hashlib.sha256()
    for name in filter(None, (settings.path, settings.heldout)):
        if is_file(name):
            path = Path(name).expanduser()
            if not path.is_file():
                raise LLMCompressError(f"data: {name}: no such file", "give a .jsonl, .json or .parquet file")
            sha.update(path.read_bytes())
    return sha.hexdigest()


def _kind(settings: DataSettings, records: Sequence[Record], rejected: Sequence[Rejected]) -> str:
    if settings.kind != "auto":
        return settings.kind
    found = next((kind for record in records if (kind := kind_of(record.fields))), None)
    if found is None:
        present = ", ".join(sorted(records[0].fields)) if records else _reasons(rejected)
        ways = "; ".join(f"{kind}: {names}" for kind, names in FIELDS.items())
        raise LLMCompressError(f"{settings.path}: no usable row (fields: {present or 'none'})", f"a row is {ways}")
    return found


def _examples(
    records: Sequence[Record],
    kind: str,
    template: bool,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    rejected: list[Rejected],
) -> list[Example]:
    found: list[Example] = []
    for record in records:
        try:
            parts = pieces(record.fields, kind, template, tokenizer)
            if settings.loss_on == "all":
                parts = [(text, True) for text, _ in parts]
            found += _fitting(record.where, *tokenized(parts, not template, tokenizer), kind, settings)
        except UnusableRowError as error:
            rejected.append(Rejected(record.where, str(error)))
    return found


def _fitting(where: str, ids: list[int], learned: list[bool], kind: str, settings: DataSettings) -> list[Example]:
    """One example; several where running text is longer than a row."""
    width = settings.seq_len
    if kind == "text":
        starts = range(0, len(ids), width)
        cut = [Example(where, ids[at : at + width], _first_off(learned[at : at + width])) for at in starts]
        kept = [one for one in cut if any(one.learned)]
        if not kept:
            raise UnusableRowError("fewer than two tokens")
        return kept
    if len(ids) > width and settings.on_too_long == "drop":
        raise UnusableRowError(f"longer than seq_len {width}")
    if not any(learned[:width]):
        raise UnusableRowError("nothing to learn within seq_len" if any(learned) else "no token to learn")
    return [Example(where, ids[:width], learned[:width])]


def _first_off(learned: list[bool]) -> list[bool]:
    return [False, *learned[1:]]


def _unlearned_first(ids: list[Any], learned: list[bool]) -> tuple[list[int], list[bool]]:
    return ids, _first_off(learned) if learned else learned


def _joined(examples: Sequence[Example]) -> Example:
    ids = list(chain.from_iterable(one.ids for one in examples))
    learned = list(chain.from_iterable(one.learned for one in examples))
    return Example(examples[0].where, ids, learned, [len(one.ids) for one in examples])


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    if share == 0 or len(examples) < 2:
        return examples, []
    size = min(max(1, round(share * len(examples))), len(examples) - 1)
    held = set(shuffled(len(examples), seed)[:size])
    train = [one for index, one in enumerate(examples) if index not in held]
    return train, [examples[index] for index in sorted(held)]


def _reasons(rejected: Sequence[Rejected]) -> str:
    counts = Counter(one.reason for one in rejected)
    first = {one.reason: one.where for one in reversed(rejected)}
    said = [f"{count} {reason}, first {first[reason]}" for reason, count in counts.most_common(3)]
    return "; ".join(said) or "it is empty"


def _hint(rejected: Sequence[Rejected], settings: DataSettings) -> str:
    if any("seq_len" in one.reason for one in rejected):
        return f"raise --seq-len above {settings.seq_len}, or set data.on_too_long=cut"
    return "; ".join(f"{kind}: {names}" for kind, names in FIELDS.items())


def _summary(
    settings: DataSettings,
    kind: str,
    template: bool,
    train: Sequence[Example],
    heldout: Sequence[Example],
    rejected: Sequence[Rejected],
) -> TrainingData:
    places: dict[str, list[str]] = {}
    for one in rejected:
        places.setdefault(one.reason, []).append(one.where)
    shown = settings.path if not is_file(settings.path) else Path(settings.path).name
    known = {tuple(one.ids) for one in train}
    return TrainingData(
        source=shown + (f" at {settings.revision}" if settings.revision else ""),
        sha256=data_digest(settings),
        kind=kind,
        chat_template=template,
        loss_on="all" if kind == "text" else settings.loss_on,
        seq_len=settings.seq_len,
        packing=settings.packing,
        num_examples=len(train),
        num_rows=len(train),
        num_heldout=len(heldout),
        num_tokens=sum(len(one.ids) for one in train),
        num_learned=sum(sum(one.learned) for one in train),
        heldout_also_trained=sum(tuple(one.ids) in known for one in heldout),
        rejected=[
            RejectedRows(reason=reason, count=len(where), places=where[:MOST_NAMED]) for reason, where in places.items()
        ],
    )
