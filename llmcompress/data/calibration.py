"""Calibration sets: which text a Hessian is taken from.

A set is a declaration (a YAML in `calibration/`, or simply a text file); with a tokenizer it becomes rows of tokens:

    CalibrationSpec ──documents──> shuffled by seed ──tokenizer──> packed or padded rows ──> CalibrationSet
    name, text, licence            same order for any              (packing.py)              tokens_NS, mask_NS, sha256
                                   number of rows

Running text is laid end to end, a beginning-of-sequence token before each document (or an end-of-sequence token after
it, where the tokenizer has no other), and cut into full rows. Conversations, which is what `field: messages` or
`chat_template: true` asks for, go through the tokenizer's chat template, one to a row.

The same set, tokenizer and numbers give the same bytes on every run; the sha256 of the tokens goes into the report.

Shapes: N sequences, S tokens of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from llmcompress.data.calibration_spec import CalibrationSpec as CalibrationSpec
from llmcompress.data.chat import conversations, need_template, render
from llmcompress.data.documents import Document, read_documents, texts
from llmcompress.data.packing import pack, pad
from llmcompress.data.sources import read_dataset
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.report import Calibration
from llmcompress.seed import derive

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LARGEST_UNKNOWN_FRAC = 0.05
"""Share of unknown tokens from which on a text counts as written for another tokenizer."""
BATCH_DOCUMENTS = 64
"""Documents tokenized together; no result depends on it except how far past the last row is looked for unknowns."""


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Rows of tokens to calibrate on: `tokens_NS` (int64) and `mask_NS` (bool, False on padding), with their origin."""

    tokens_NS: torch.Tensor
    mask_NS: torch.Tensor
    provenance: Calibration

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return self.provenance.num_tokens


def load_calibration(
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    max_positions: int | None = None,
) -> CalibrationSet:
    """The rows of a set: exactly `num_samples` of `seq_len` tokens; None stands for the set's own value.

    `max_positions` is the longest sequence that the model takes (None: unlimited). Asking for more rows leaves the
    earlier ones as they are.

    Raises: LLMCompressError for numbers out of range, for whatever is wrong with the text (documents.py, chat.py,
    dataset.py), for a tokenizer that it does not fit, and for fewer rows of text than asked.
    """
    num_samples = spec.num_samples if num_samples is None else num_samples
    seq_len = spec.seq_len if seq_len is None else seq_len
    seed = spec.seed if seed is None else seed
    raise_all(_range_problems(spec.name, num_samples, seq_len, max_positions))
    if spec.chat:
        need_template(tokenizer, spec.name)
    documents = _read(spec)
    rows = _chat_rows if spec.chat else _text_rows
    tokens, mask = rows(spec.name, documents, tokenizer, num_samples, seq_len, derive(seed, "calibration"))
    return _finish(spec, tokens, mask, seed)


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order drawn from `seed`.

    Sorted by the raw draws of PCG64, whose stream NumPy promises to keep; what its shuffle makes of them it does not.
    """
    import numpy as np

    draws = np.random.PCG64(seed).random_raw(count)
    return [int(index) for index in np.argsort(draws, kind="stable")]


def digest(tokens_NS: torch.Tensor, mask_NS: torch.Tensor) -> str:
    """sha256 over the tokens as little-endian int64 and the mask as one byte each, row by row."""
    tokens = tokens_NS.contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(tokens + mask_NS.contiguous().numpy().tobytes()).hexdigest()


def _range_problems(name: str, num_samples: int, seq_len: int, max_positions: int | None) -> list[LLMCompressError]:
    where = f"calibration set {name!r}"
    problems = []
    if num_samples < 1:
        problems.append(LLMCompressError(f"{where}: num_samples is {num_samples}; at least 1 is needed"))
    if seq_len < 2:
        problems.append(LLMCompressError(f"{where}: seq_len is {seq_len}; at least 2 is needed"))
    if max_positions is not None and seq_len > max_positions:
        problems.append(
            LLMCompressError(
                f"{where}: seq_len is {seq_len}; the model takes at most {max_positions} positions",
                f"pass --seq-len {max_positions} or less",
            )
        )
    return problems


def _read(spec: CalibrationSpec) -> list[Document]:
    if spec.dataset:
        of = spec.dataset
        return read_dataset(of.path, of.name, of.split, of.revision, spec.field)
    return read_documents(spec.text_file, spec.field, spec.sha256)


def _text_rows(
    name: str, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, num_rows: int, seq_len: int, seed: int
) -> tuple[list[list[int]], list[list[bool]]]:
    written = texts(documents)
    wanted = num_rows * seq_len
    found = _tokenize(tokenizer, [written[index] for index in shuffled(len(written), seed)], wanted)
    _need_known(name, tokenizer, found)
    before, after = _separators(tokenizer)
    separated = [before + document + after for document in found]
    rows = pack(separated, seq_len, num_rows)
    if len(rows) < num_rows:
        num_tokens = sum(map(len, separated))
        longest = num_tokens // num_rows
        ways = [f"--num-samples {len(rows)}"] * bool(rows) + [f"--seq-len {longest}"] * (longest > 1)
        raise LLMCompressError(
            f"calibration set {name!r}: text for {len(rows)} rows of {seq_len} tokens ({num_tokens} tokens in all); "
            f"{num_rows} rows asked",
            f"lower --num-samples or --seq-len ({' or '.join(ways) or 'this text is too short for either'}), "
            "or give more text",
        )
    return rows, [[True] * seq_len for _ in rows]


def _chat_rows(
    name: str, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, num_rows: int, seq_len: int, seed: int
) -> tuple[list[list[int]], list[list[bool]]]:
    found = conversations(documents)
    if len(found) < num_rows:
        raise LLMCompressError(
            f"calibration set {name!r}: conversations for {len(found)} rows; {num_rows} rows asked",
            f"lower --num-samples (--num-samples {len(found)}; a shorter --seq-len gives no more rows), "
            "or give more conversations",
        )
    order = shuffled(len(found), seed)[:num_rows]
    rendered = [render(tokenizer, *found[index]) for index in order]
    _need_known(name, tokenizer, rendered)
    fallback = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return pad(rendered, seq_len, next(int(token) for token in fallback if token is not None))


def _tokenize(tokenizer: PreTrainedTokenizerBase, written: Sequence[str], num_tokens: int) -> list[list[int]]:
    """The token ids of the texts, in order, until there are `num_tokens`; no special token is added."""
    found: list[list[int]] = []
    count = 0
    for start in range(0, len(written), BATCH_DOCUMENTS):
        batch = list(written[start : start + BATCH_DOCUMENTS])
        found += tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        count += sum(map(len, found[start:]))
        if count >= num_tokens:
            break
    return found


def _separators(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What goes before and after each document: bos before, or else eos after, or else nothing."""
    if tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id)], []
    if tokenizer.eos_token_id is not None:
        return [], [int(tokenizer.eos_token_id)]
    return [], []


def _need_known(name: str, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> None:
    """Raise when the tokenizer does not know the text.

    Byte-level tokenizers know everything; they have no unknown token, or name another special one as such.
    """
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in special:
        return
    tokens = list(chain.from_iterable(sequences))
    share = tokens.count(unknown) / max(len(tokens), 1)
    if share > LARGEST_UNKNOWN_FRAC:
        raise LLMCompressError(
            f"calibration set {name!r}: the tokenizer turns {share:.1%} of this text into unknown tokens; "
            f"at most {LARGEST_UNKNOWN_FRAC:.0%} is accepted",
            "the tokenizer does not fit this text: choose text of the kind that the model was trained on",
        )


def _finish(spec: CalibrationSpec, rows: list[list[int]], mask: list[list[bool]], seed: int) -> CalibrationSet:
    import torch

    tokens_NS = torch.tensor(rows, dtype=torch.int64)
    mask_NS = torch.tensor(mask, dtype=torch.bool)
    provenance = Calibration(
        name=spec.name,
        source=spec.source,
        licence=spec.licence,
        num_samples=tokens_NS.shape[0],
        seq_len=tokens_NS.shape[1],
        num_tokens=int(mask_NS.sum()),
        chat_template=spec.chat,
        seed=seed,
        sha256=digest(tokens_NS, mask_NS),
    )
    return CalibrationSet(tokens_NS, mask_NS, provenance)
