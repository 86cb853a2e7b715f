"""Calibration sets: which text a Hessian is taken from.

A set is a declaration (a YAML in `calibration/`, or simply a text file); with a tokenizer it becomes rows of tokens:

    CalibrationSpec ──documents──> shuffled by seed ──tokenizer──> packed or padded rows ──> CalibrationSet
    name, text, licence            same order for any              (collate.py)              tokens_NS, mask_NS, sha256
                                   number of rows

Running text is laid end to end, a beginning-of-sequence token before each document (or an end-of-sequence token after
it, where the tokenizer has no other), and cut into full rows. Conversations, which is what `field: messages` or
`chat_template: true` asks for, go through the tokenizer's chat template, one to a row. A file of which no field is
named and whose rows have no `text` is read as training reads it: chats as chats, prompts with their completions.

What a model was trained on is a calibration set, too (`training_calibration`): what a model is meant for is what it is
quantized on.

The same set, tokenizer and numbers give the same bytes on every run; the sha256 of the tokens goes into the report.

Shapes: N sequences, S tokens of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from llmcompress.data.calibration_spec import CalibrationSpec as CalibrationSpec
from llmcompress.data.chat import (
    SHAPE,
    Message,
    UnusableRowError,
    parse_messages,
    parse_tools,
    render,
    require_template,
)
from llmcompress.data.collate import pack, pad, padding_token
from llmcompress.data.examples import conversation_of, kind_of, load_examples, spans_of
from llmcompress.data.settings import DataSettings
from llmcompress.data.sources import Document, pick, raise_some, read_rows, require_sha256, texts
from llmcompress.errors import LLMCompressError, raise_all
from llmcompress.report import Calibration
from llmcompress.seed import derive, shuffled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LARGEST_UNKNOWN_FRAC = 0.05
"""Share of unknown tokens from which on a text counts as written for another tokenizer."""
BATCH_DOCUMENTS = 64
"""Documents tokenized together; no result depends on it except how far past the last row is looked for unknowns."""
TRAINING_DATA = "training data"
"""What the report calls a calibration set of the rows that the model was trained on."""
TRAINING_SAMPLES = 128


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

    Raises: LLMCompressError for numbers out of range, for whatever is wrong with the text (sources.py, chat.py), for a
    tokenizer that it does not fit, and for fewer rows of text than asked.
    """
    num_samples = spec.num_samples if num_samples is None else num_samples
    seq_len = spec.seq_len if seq_len is None else seq_len
    seed = spec.seed if seed is None else seed
    raise_all(_range_problems(spec.name, num_samples, seq_len, max_positions))
    name = f"calibration set {spec.name!r}"
    if spec.chat:
        require_template(tokenizer, name)
    documents, chat = _read_documents(spec, tokenizer)
    to_rows = _chat_rows if chat else _text_rows
    tokens, mask = to_rows(name, documents, tokenizer, num_samples, seq_len, derive(seed, "calibration"))
    return _calibration_set(
        tokens, mask, name=spec.name, source=spec.source, license=spec.licence, chat_template=chat, seed=seed
    )


def training_calibration(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    num_samples: int | None = None,
    seq_len: int | None = None,
) -> CalibrationSet:
    """Training examples (never held-out ones) drawn by `seed`, one to a row, padded to the longest of them.

    num_samples: rows at most (default 128); seq_len: longer ones are cut there.

    Raises: LLMCompressError as `load_examples`.
    """
    rows = load_examples(data.model_copy(update={"packing": False}), tokenizer, seed)
    order = shuffled(len(rows.train), derive(seed, "calibration"))[: num_samples or TRAINING_SAMPLES]
    chosen = [rows.train[index].ids for index in order]
    longest = max(map(len, chosen))
    tokens, mask = pad(chosen, min(longest, seq_len or longest), padding_token(tokenizer))
    return _calibration_set(
        tokens, mask, name=TRAINING_DATA, source=rows.summary.source, chat_template=rows.summary.chat_template,
        seed=seed,
    )  # fmt: skip


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


def _read_documents(spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Document], bool]:
    """The documents of a set, and whether they are conversations."""
    if spec.dataset is not None:
        of = spec.dataset
        rows, rejected = read_rows(of.path, of.name, of.split, of.revision)
    else:
        if spec.sha256 is not None:
            require_sha256(spec.text_file, spec.sha256)
        rows, rejected = read_rows(str(spec.text_file))
    if not rows and not rejected:
        raise LLMCompressError(f"{spec.text_file if spec.text else spec.source}: no text in it", "give some text")
    kind = kind_of(rows[0].fields) if rows and not (spec.names_field or spec.chat or "text" in rows[0].fields) else None
    if kind is None:
        return pick(rows, rejected, spec.field), spec.chat
    raise_some([LLMCompressError(f"{row.where}: {row.reason}", "every row is one object") for row in rejected])
    chat = kind == "chat" or (kind == "instruction" and bool(tokenizer.chat_template))
    if chat:
        require_template(tokenizer, f"calibration set {spec.name!r} of chats")
    documents, problems = [], []
    for row in rows:
        try:
            if chat:
                documents.append(Document(row.where, conversation_of(row.fields)[0], row.fields.get("tools")))
            else:
                spans, _ = spans_of(row.fields, kind, False, tokenizer)
                text = "".join(text for text, _ in spans).removesuffix(str(tokenizer.eos_token or ""))
                documents.append(Document(row.where, text))
        except UnusableRowError as error:
            problems.append(LLMCompressError(f"{row.where}: {error}"))
    raise_some(problems)
    return documents, chat


def _text_rows(
    name: str, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, num_rows: int, seq_len: int, seed: int
) -> tuple[list[list[int]], list[list[bool]]]:
    written = texts(documents)
    shuffled_texts = [written[index] for index in shuffled(len(written), seed)]
    tokenized = _tokenize(tokenizer, shuffled_texts, num_rows * seq_len)
    _require_known(name, tokenizer, tokenized)
    before, after = _separators(tokenizer)
    separated = [before + document + after for document in tokenized]
    rows = pack(separated, seq_len, num_rows)
    if len(rows) < num_rows:
        num_tokens = sum(map(len, separated))
        longest = num_tokens // num_rows
        ways = [f"--num-samples {len(rows)}"] * bool(rows) + [f"--seq-len {longest}"] * (longest > 1)
        raise LLMCompressError(
            f"{name}: text for {len(rows)} rows of {seq_len} tokens ({num_tokens} tokens in all); "
            f"{num_rows} rows asked",
            f"lower --num-samples or --seq-len ({' or '.join(ways) or 'this text is too short for either'}), "
            "or give more text",
        )
    return rows, [[True] * seq_len for _ in rows]


def _chat_rows(
    name: str, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, num_rows: int, seq_len: int, seed: int
) -> tuple[list[list[int]], list[list[bool]]]:
    conversations: list[tuple[str, list[Message], list[dict[str, Any]] | None]] = []
    problems = []
    for document in documents:
        try:
            messages = parse_messages(document.content)
            tools = parse_tools(document.tools)
        except UnusableRowError as error:
            problems.append(LLMCompressError(f"{document.where}: {error}", SHAPE))
        else:
            conversations += [(document.where, messages, tools)] if messages else []
    raise_some(problems)
    if not conversations:
        raise LLMCompressError(f"{documents[0].where}: this document and all after it are blank", "give some text")
    if len(conversations) < num_rows:
        raise LLMCompressError(
            f"{name}: conversations for {len(conversations)} rows; {num_rows} rows asked",
            f"lower --num-samples (--num-samples {len(conversations)}; a shorter --seq-len gives no more rows), "
            "or give more conversations",
        )
    sequences = []
    for index in shuffled(len(conversations), seed)[:num_rows]:
        where, messages, tools = conversations[index]
        try:
            text = render(tokenizer, messages, tools)
        except UnusableRowError as error:
            hint = "leave the conversation out, or set `chat_template: false` for plain text"
            raise LLMCompressError(f"{where}: {error}", hint) from error
        sequences.append(list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
        if not sequences[-1]:
            raise LLMCompressError(f"{where}: the chat template renders this conversation to no token at all")
    _require_known(name, tokenizer, sequences)
    return pad(sequences, seq_len, padding_token(tokenizer))


def _tokenize(tokenizer: PreTrainedTokenizerBase, written: Sequence[str], num_tokens: int) -> list[list[int]]:
    """The token ids of the texts, in order, until there are `num_tokens`; no special token is added."""
    tokenized: list[list[int]] = []
    count = 0
    for start in range(0, len(written), BATCH_DOCUMENTS):
        batch = list(written[start : start + BATCH_DOCUMENTS])
        tokenized += tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        count += sum(map(len, tokenized[start:]))
        if count >= num_tokens:
            break
    return tokenized


def _separators(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What goes before and after each document: bos before, or else eos after, or else nothing."""
    if tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id)], []
    if tokenizer.eos_token_id is not None:
        return [], [int(tokenizer.eos_token_id)]
    return [], []


def _require_known(name: str, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]) -> None:
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
            f"{name}: the tokenizer turns {share:.1%} of this text into unknown tokens; "
            f"at most {LARGEST_UNKNOWN_FRAC:.0%} is accepted",
            "the tokenizer does not fit this text: choose text of the kind that the model was trained on",
        )


def _calibration_set(rows: list[list[int]], mask: list[list[bool]], **known: Any) -> CalibrationSet:
    """known: name, source, licence, chat_template and seed, as the report has them."""
    import torch

    tokens_NS = torch.tensor(rows, dtype=torch.int64)
    mask_NS = torch.tensor(mask, dtype=torch.bool)
    provenance = Calibration(
        num_samples=tokens_NS.shape[0],
        seq_len=tokens_NS.shape[1],
        num_tokens=int(mask_NS.sum()),
        sha256=digest(tokens_NS, mask_NS),
        **known,
    )
    return CalibrationSet(tokens_NS, mask_NS, provenance)
