"""From token lists to rows of one length.

Two ways to fill a rectangle of N sequences by S tokens:

    pack   a b c | d e | f g h i      documents end to end, cut every S tokens: no padding, nothing wasted
           └ a b c d ┘ └ e f g h ┘    what is left at the end (i) does not make a row

    pad    a b c d      (cut)         one sequence per row: cut at S, or filled up with padding that the mask marks
           e f . .      mask 1 1 0 0

Running text is packed: a Hessian wants many different tokens in long contexts. Conversations are padded: a row that
began in the middle of a turn would show the model a prompt it never sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
