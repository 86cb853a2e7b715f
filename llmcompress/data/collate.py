"""From token lists to rows, and from rows to batches.

Running text to calibrate on is packed, since a Hessian wants many different tokens in long contexts; conversations are
padded, since a row that began in the middle of a turn would show the model a prompt that it never sees:

    pack   a b c | d e | f g h i      documents end to end, cut every S tokens: no padding, nothing wasted
           └ a b c d ┘ └ e f g h ┘    what is left at the end (i) does not make a row

    pad    a b c d      (cut)         one sequence per row: cut at S, or filled up with padding that the mask marks
           e f . .      mask 1 1 0 0

Training examples are packed whole, best fit first: position ids start again with each, by which transformers keeps them
from seeing one another.

Shapes: B rows of a batch, S tokens of the longest of them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that no loss is taken of."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and of which a loss is taken, both of one length; `lengths` of the examples that a packed row holds.

    The first token of an example has no loss, since nothing precedes it.
    """

    where: str
    ids: list[int]
    loss_mask: list[bool]
    lengths: list[int] = field(default_factory=list)


def pack(documents: Iterable[Sequence[int]], seq_len: int, num_rows: int) -> list[list[int]]:
    """The first `num_rows` full rows of `seq_len` tokens of the documents laid end to end; fewer if they run out.

    Documents are taken only until the rows are full, so an endless iterable is fine, and asking for more rows never
    changes the earlier ones.

    >>> pack([[1, 2, 3], [4, 5], [6, 7, 8, 9]], seq_len=4, num_rows=9)
    [[1, 2, 3, 4], [5, 6, 7, 8]]
    """
    assert seq_len > 0
    rows: list[list[int]] = []
    rest: list[int] = []
    for document in documents:
        rest.extend(document)
        full = min(len(rest) // seq_len, num_rows - len(rows))
        rows += [rest[start : start + seq_len] for start in range(0, full * seq_len, seq_len)]
        del rest[: full * seq_len]
        if len(rows) >= num_rows:
            break
    return rows


def pad(sequences: Iterable[Sequence[int]], seq_len: int, padding: int) -> tuple[list[list[int]], list[list[bool]]]:
    """One row per sequence, cut at `seq_len` or filled up on the right with `padding`; and where its own tokens are.

    >>> pad([[1, 2, 3], [4]], seq_len=2, padding=0)
    ([[1, 2], [4, 0]], [[True, True], [True, False]])
    """
    rows: list[list[int]] = []
    mask: list[list[bool]] = []
    for sequence in sequences:
        kept = list(sequence[:seq_len])
        missing = seq_len - len(kept)
        rows.append(kept + [padding] * missing)
        mask.append([True] * len(kept) + [False] * missing)
    return rows, mask


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up rows: the padding token, or the end of a sequence, or 0. No result depends on it."""
    return next(int(token) for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(token, int))


def pack_examples(examples: Sequence[Example], seq_len: int) -> list[Example]:
    """The examples in as few rows of `seq_len` tokens as best fit finds, longest first; none is cut.

    >>> examples = [Example("", [1] * size, [True] * size) for size in (3, 6, 4)]
    >>> [row.lengths for row in pack_examples(examples, 8)]
    [[6], [4, 3]]
    """
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].ids), index))
    room: list[tuple[int, int]] = []
    rows: list[list[Example]] = []
    for index in order:
        size = len(examples[index].ids)
        at = bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(examples[index])
        insort(room, (left - size, row))
    return [
        Example(
            row[0].where,
            list(chain.from_iterable(example.ids for example in row)),
            list(chain.from_iterable(example.loss_mask for example in row)),
            [len(example.ids) for example in row],
        )
        for row in rows
    ]


def labels_of(example: Example) -> list[int]:
    """The token ids, and IGNORED where no loss is taken."""
    return [token if counts else IGNORED for token, counts in zip(example.ids, example.loss_mask, strict=True)]


def collate(rows: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """A batch: input_ids and labels [B, S] filled up with `padding`, and attention_mask, or position_ids where rows
    are packed (padding then counts as an example of its own, which sees nothing else).
    """
    import torch

    longest = max(len(row.ids) for row in rows)
    fill = [longest - len(row.ids) for row in rows]
    ids = [[*row.ids, *[padding] * more] for row, more in zip(rows, fill, strict=True)]
    labels = [[*labels_of(row), *[IGNORED] * more] for row, more in zip(rows, fill, strict=True)]
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    if any(row.lengths for row in rows):
        spans = [[*(row.lengths or [len(row.ids)]), more] for row, more in zip(rows, fill, strict=True)]
        batch["position_ids"] = torch.tensor([list(chain.from_iterable(map(range, lengths))) for lengths in spans])
    else:
        masks = [[1] * len(row.ids) + [0] * more for row, more in zip(rows, fill, strict=True)]
        batch["attention_mask"] = torch.tensor(masks)
    return batch
