"""Training examples: rows of a file as token ids, with what is trained marked, split, and laid into rows.

    rows ──by their fields──> spans ──tokenizer──> Example(ids, loss_mask) ──split──> training | held out ──pack──> rows
      └── rejected: not JSON, empty, too long, …  each counted, and named by its line

What a row is, is told by its fields:

    text          {"text": …}                                    all of it is trained
    prompt        {"prompt": …, "completion": …}                 the completion is trained
    instruction   {"instruction": …, "input"?: …, "output": …}   (or "response") the output is trained
    chat          {"messages": [{"role": …, "content": …}, …]}   what the assistant says is trained
                  {"conversations": [{"from": …, "value": …}]}   the same in ShareGPT's spelling
                  {"prompt": [messages], "completion": [messages]}   the answers in the completion are (TRL's spelling)
                  with "tools" beside it: the schemas that the template is given

A token is trained when it begins inside a trained span; the first of an example never is, since nothing precedes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmcompress.data.chat import (
    Span,
    UnusableRowError,
    parse_messages,
    parse_tools,
    require_template,
    trained_spans,
)
from llmcompress.data.collate import Example as Example
from llmcompress.data.collate import pack_examples
from llmcompress.data.settings import DataSettings
from llmcompress.data.sources import RejectedRow, Row, digest_files, is_file, is_text, read_rows
from llmcompress.errors import LLMCompressError
from llmcompress.report import RejectedRows, TrainingData
from llmcompress.seed import derive, shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
MOST_NAMED = 10
"""Places that the report names of the rows rejected for one reason."""
OUTPUTS = ("output", "response")
FIELDS = {
    "text": "text",
    "prompt": "prompt and completion",
    "instruction": "instruction and output (or response)",
    "chat": "messages (or conversations)",
}
"""Kind -> the fields that make a row one."""


@dataclass(frozen=True)
class TrainingSet:
    """Rows to train on and rows held out, with what the report says of them."""

    train: list[Example]
    heldout: list[Example]
    summary: TrainingData


@dataclass
class RowReader:
    """Reads files of rows into examples, all in the way that the first row of the first file decides."""

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    rejected: list[RejectedRow] = field(default_factory=list)
    kind: str = ""
    template: bool = False

    def read(self, path: str, *of_dataset: Any) -> list[Example]:
        """The examples of a file, a folder or a dataset (configuration, split, revision).

        Raises: LLMCompressError as `read_rows`, for rows of no known kind, and for chats without a chat template.
        """
        rows, bad = read_rows(path, *of_dataset)
        rows = rows[: self.settings.max_rows]
        self.rejected += bad
        if not self.kind:
            self._decide(path, rows)
        examples: list[Example] = []
        for row in rows:
            try:
                examples += self._examples(row)
            except UnusableRowError as error:
                self.rejected.append(RejectedRow(row.where, str(error)))
        return examples

    def _decide(self, path: str, rows: Sequence[Row]) -> None:
        asked = self.settings.kind
        kind = next(filter(None, (kind_of(row.fields) for row in rows)), None) if asked == "auto" else asked
        if kind is None:
            present = ", ".join(sorted(rows[0].fields)) if rows else reasons(self.rejected)
            raise LLMCompressError(f"{path}: no usable row (fields: {present or 'none'})", f"a row is {_kinds()}")
        wanted = self.settings.chat_template
        if kind == "chat" and wanted is False:
            raise LLMCompressError("data: chat needs the chat template", "drop chat_template: false")
        if kind == "chat" or (kind == "instruction" and wanted):
            require_template(self.tokenizer, f"data: rows of kind {kind}")
        self.kind = kind
        uses_template = kind in ("chat", "instruction") and wanted is not False
        self.template = uses_template and bool(self.tokenizer.chat_template)

    def _examples(self, row: Row) -> list[Example]:
        """One example; several where running text is longer than a row."""
        spans, rendered = spans_of(row.fields, self.kind, self.template, self.tokenizer)
        self.template |= rendered
        if self.settings.loss_on == "all":
            spans = [(text, True) for text, _ in spans]
        ids, loss_mask = tokenize_spans(spans, self.tokenizer, add_special_tokens=not rendered)
        width = self.settings.seq_len
        if self.kind == "text":
            pieces = [
                (ids[at : at + width], [False, *loss_mask[at + 1 : at + width]]) for at in range(0, len(ids), width)
            ]
            examples = [Example(row.where, *piece) for piece in pieces if any(piece[1])]
            if not examples:
                raise UnusableRowError("fewer than two tokens")
            return examples
        if len(ids) > width and self.settings.on_too_long == "drop":
            raise UnusableRowError(f"longer than seq_len {width}")
        if not any(loss_mask[:width]):
            raise UnusableRowError("nothing to learn within seq_len" if any(loss_mask) else "no token to learn")
        return [Example(row.where, ids[:width], loss_mask[:width])]


def load_examples(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> TrainingSet:
    """Read, render, tokenize and split the data; the same settings, tokenizer and seed give the same rows.

    Raises: LLMCompressError for what is wrong with the file as a whole, rows of no known kind, and no usable row.
    """
    reader = RowReader(settings, tokenizer)
    train, heldout = reader.read(settings.path, settings.config, settings.split, settings.revision), []
    if settings.heldout is not None:
        heldout = reader.read(settings.heldout)
    else:
        train, heldout = split_heldout(train, settings.heldout_frac, seed)
    if not train or (settings.heldout is not None and not heldout):
        path = settings.path if not train else settings.heldout
        hint = f"a row is {_kinds()}"
        if any("seq_len" in row.reason for row in reader.rejected):
            hint = f"raise --seq-len above {settings.seq_len}, or set data.on_too_long=cut"
        raise LLMCompressError(f"{path}: no usable row ({reasons(reader.rejected)})", hint)
    packed = pack_examples(train, settings.seq_len) if settings.packing else train
    summary = summarize(
        settings,
        [example.ids for example in train],
        [example.ids for example in heldout],
        reader.rejected,
        kind=reader.kind,
        chat_template=reader.template,
        loss_on="all" if reader.kind == "text" else settings.loss_on,
        num_rows=len(packed),
        num_loss_tokens=sum(sum(example.loss_mask) for example in train),
    )
    return TrainingSet(packed, heldout, summary)


def kind_of(fields: dict[str, Any]) -> str | None:
    """The kind of a row, by the fields it has.

    >>> kind_of({"instruction": "Add.", "input": "1 2", "output": "3"}), kind_of({"label": 1})
    ('instruction', None)
    """
    if "messages" in fields or "conversations" in fields:
        return "chat"
    if "prompt" in fields and "completion" in fields:
        return "chat" if isinstance(fields["prompt"], list) else "prompt"
    if "instruction" in fields and any(name in fields for name in OUTPUTS):
        return "instruction"
    return "text" if "text" in fields else None


def spans_of(
    fields: dict[str, Any], kind: str, template: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Span], bool]:
    """The row as spans of text in order, and whether the chat template wrote them (with its special tokens).

    Raises: UnusableRowError with the reason when a field is missing, empty or of the wrong type, or the chat template
    refuses the row.
    """
    end = str(tokenizer.eos_token or "")
    if kind == "text":
        return [(_text(fields, "text") + end, True)], False
    if kind == "chat" or isinstance(fields.get("prompt"), list) or (kind == "instruction" and template):
        if not tokenizer.chat_template:
            raise UnusableRowError("a conversation, and the tokenizer of this checkpoint has no chat template")
        value, num_context = conversation_of(fields)
        if not isinstance(value, list):
            raise UnusableRowError(f"a {type(value).__name__} where a conversation is expected")
        return trained_spans(tokenizer, parse_messages(value), parse_tools(fields.get("tools")), num_context), True
    if kind == "prompt":
        return [(_text(fields, "prompt"), False), (_text(fields, "completion") + end, True)], False
    output = _text(fields, next((name for name in OUTPUTS if name in fields), OUTPUTS[0]))
    request, given = _text(fields, "instruction"), str(fields.get("input") or "").strip()
    given = f"\n\n### Input:\n{given}" if given else ""
    return [(f"### Instruction:\n{request}{given}\n\n### Response:\n", False), (output + end, True)], False


def conversation_of(fields: dict[str, Any]) -> tuple[object, int]:
    """The conversation of a row, not yet parsed, and how many of its first messages are context only.

    Raises: UnusableRowError where the row holds none.
    """
    if "messages" in fields or "conversations" in fields:
        return fields.get("messages", fields.get("conversations")), 0
    if "instruction" in fields:
        output = _text(fields, next((name for name in OUTPUTS if name in fields), OUTPUTS[0]))
        request, given = _text(fields, "instruction"), str(fields.get("input") or "").strip()
        asked = f"{request}\n\n{given}" if given else request
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}], 1
    prompt, completion = fields.get("prompt"), fields.get("completion")
    completion = [{"role": "assistant", "content": completion}] if is_text(completion) else completion
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise UnusableRowError("no messages")
    return [*prompt, *completion], len(prompt)


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise UnusableRowError(f"no field {name!r}")
    if not is_text(fields[name]):
        raise UnusableRowError(f"field {name!r} is no text")
    if not fields[name].strip():
        raise UnusableRowError(f"field {name!r} is empty")
    return str(fields[name])


def tokenize_spans(
    spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> tuple[list[int], list[bool]]:
    """Token ids of the spans as one text, and which tokens begin inside a trained span (never the first).

    add_special_tokens: bos and eos where the tokenizer adds them by itself.
    """
    loss_mask: list[bool] = []
    if not getattr(tokenizer, "is_fast", False):
        pieces = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text, _ in spans]
        start = [tokenizer.bos_token_id] if add_special_tokens and tokenizer.bos_token_id is not None else []
        loss_mask = [False] * len(start)
        for piece, (_, trained) in zip(pieces, spans, strict=True):
            loss_mask += [trained] * len(piece)
        ids: list[int] = [*start, *chain.from_iterable(pieces)]
    else:
        text = "".join(text for text, _ in spans)
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        ends = list(accumulate(len(text) for text, _ in spans))
        bounds = [(end - len(text), end) for end, (text, trained) in zip(ends, spans, strict=True) if trained]
        for start_char, end_char in encoded["offset_mapping"]:
            loss_mask.append(end_char > start_char and any(low <= start_char < high for low, high in bounds))
    return ids, [False, *loss_mask[1:]] if loss_mask else []


def split_heldout(rows: list[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Rows to train on and rows held out, both in their order; at least one of each where there are two."""
    if share == 0 or len(rows) < 2:
        return rows, []
    size = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(shuffled(len(rows), derive(seed, "held-out"))[:size])
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]


def summarize(
    settings: DataSettings,
    train_ids: Sequence[list[int]],
    heldout_ids: Sequence[list[int]],
    rejected: Sequence[RejectedRow],
    **known: Any,
) -> TrainingData:
    """What the report says of the data: counts of examples and tokens, and the rejected rows by reason.

    known: fields of the report that depend on the kind of model.
    """
    places: dict[str, list[str]] = {}
    for row in rejected:
        places.setdefault(row.reason, []).append(row.where)
    trained = set(map(tuple, train_ids))
    values = {
        "source": source_name(settings),
        "sha256": data_digest(settings),
        "seq_len": settings.seq_len,
        "packing": settings.packing,
        "num_examples": len(train_ids),
        "num_rows": len(train_ids),
        "num_heldout": len(heldout_ids),
        "num_tokens": sum(map(len, train_ids)),
        "num_heldout_in_training": sum(tuple(ids) in trained for ids in heldout_ids),
        "rejected": [
            RejectedRows(reason=reason, count=len(where), locations=where[:MOST_NAMED])
            for reason, where in places.items()
        ],
    }
    return TrainingData(**(values | known))


def source_name(settings: DataSettings) -> str:
    """What the report calls the data: the name of a file or folder, or a dataset id with its revision."""
    local = is_file(settings.path) or Path(settings.path).expanduser().is_dir()
    name = Path(settings.path).name if local else settings.path
    return f"{name} at {settings.revision}" if settings.revision else name


def data_digest(settings: DataSettings) -> str:
    """sha256 over the bytes of the files that the settings name; that of nothing for a Hub dataset.

    Raises: LLMCompressError for a file that is missing.
    """
    return digest_files(settings.path, settings.heldout)


def reasons(rejected: Sequence[RejectedRow]) -> str:
    """Why rows were rejected, the most frequent reasons first, each with the first place."""
    counts = Counter(row.reason for row in rejected)
    first = {row.reason: row.where for row in reversed(rejected)}
    shown = [f"{count} {reason}, first {first[reason]}" for reason, count in counts.most_common(3)]
    return "; ".join(shown) or "it is empty"


def _kinds() -> str:
    return "; ".join(f"{kind}: {names}" for kind, names in FIELDS.items())
