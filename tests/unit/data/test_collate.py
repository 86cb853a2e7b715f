from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count

from hypothesis import given
from hypothesis import strategies as st

from llmcompress.data.collate import pack, pad

documents = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12)


@given(documents, st.integers(1, 9), st.integers(0, 9))
def test_packing_cuts_the_concatenation(given_documents: list[list[int]], seq_len: int, num_rows: int) -> None:
    rows = pack(given_documents, seq_len, num_rows)
    everything = list(chain.from_iterable(given_documents))
    assert len(rows) == min(num_rows, len(everything) // seq_len)
    assert all(len(row) == seq_len for row in rows)
    assert list(chain.from_iterable(rows)) == everything[: len(rows) * seq_len]


@given(documents, st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_more_rows_leave_the_earlier_ones(given_documents: list[list[int]], seq_len: int, few: int, more: int) -> None:
    assert pack(given_documents, seq_len, few + more)[:few] == pack(given_documents, seq_len, few)


@given(documents, st.integers(1, 9))
def test_packing_changes_no_document(given_documents: list[list[int]], seq_len: int) -> None:
    before = [list(document) for document in given_documents]
    pack(given_documents, seq_len, 5)
    assert given_documents == before


def test_packing_stops_when_the_rows_are_full() -> None:
    taken: list[int] = []

    def endless() -> Iterator[list[int]]:
        for number in count():
            taken.append(number)
            yield [number] * 3

    assert pack(endless(), seq_len=4, num_rows=2) == [[0, 0, 0, 1], [1, 1, 2, 2]]
    assert taken == [0, 1, 2]


@given(documents, st.integers(1, 9), st.integers(-1, 9))
def test_padding_keeps_each_beginning(sequences: list[list[int]], seq_len: int, padding: int) -> None:
    rows, mask = pad(sequences, seq_len, padding)
    assert len(rows) == len(mask) == len(sequences)
    for row, own, sequence in zip(rows, mask, sequences, strict=True):
        kept = min(len(sequence), seq_len)
        assert row == sequence[:kept] + [padding] * (seq_len - kept)
        assert own == [True] * kept + [False] * (seq_len - kept)
