"""Token ids and the rows of a model that they index: whether every id has one, and what two models have in common.

    tokenizer    ids 0 … n-1
    embeddings   [ tokens ........................ | padding ......... ]    rows >= n, often a round number
    logits       [ tokens ........................ | padding ......... ]

A tokenizer that grew after its model was trained (added tokens, a chat template that writes them) gives ids that the
model has no row for; torch ends there in an IndexError, on a GPU in an assert that kills the process. `need_rows` or
`check_ids` is asked wherever token ids meet a model: calibration, training, held-out text, requests of lm-eval.

Models of one family often differ in padding alone: Qwen2.5's smaller ones have 151936 rows, the larger ones 152064, for
151665 tokens. Predictions are then compared over the rows that both have (`shared_vocabulary`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.errors import LLMCompressError

if TYPE_CHECKING:
    import torch
    from torch import nn

HINT = (
    "tokens were added to this tokenizer and the model's embedding was not resized: give the checkpoint with its "
    "embedding resized (model.resize_token_embeddings), or the tokenizer that it was trained with"
)


def num_embeddings(model: Any) -> int:
    """Rows of a model's input embedding: ids below it can be read. The weight may be on the meta device."""
    return int(model.get_input_embeddings().weight.shape[0])


def need_rows(ids: torch.Tensor | Iterable[int], num_rows: int, tokenizer: Any, where: str) -> None:
    """Raise unless every id has a row of the embedding.

    ids: of any shape. tokenizer: names the token in the error; None: it has no name there. where: the tokenizer's file
    or folder, and what the ids come from.

    Raises: LLMCompressError naming the token, its id, and the number of rows.
    """
    highest, lowest = _extremes(ids)
    if lowest >= 0 and highest < num_rows:
        return
    wrong = highest if highest >= num_rows else lowest
    token = tokenizer.convert_ids_to_tokens(wrong) if wrong >= 0 and tokenizer is not None else None
    raise LLMCompressError(f"{where}: token {token!r} has id {wrong}, and the model embeds {num_rows} rows", HINT)


def check_ids(ids: torch.Tensor | Iterable[int], model: Any) -> None:
    """`need_rows` for a model that transformers built of a folder, whose own tokenizer names the token.

    The tokenizer is read only where an id has no row.

    Raises: LLMCompressError as `need_rows`.
    """
    num_rows = num_embeddings(model)
    highest, lowest = _extremes(ids)
    if lowest >= 0 and highest < num_rows:
        return
    folder = Path(model.config.name_or_path)
    try:
        tokenizer = load_tokenizer(folder)
    except LLMCompressError:  # it is only asked for a name
        tokenizer = None
    need_rows([lowest, highest], num_rows, tokenizer, tokenizer_place(folder))


def guard_embedding(model: nn.Module, tokenizer: Any, where: str) -> None:
    """Have `model` ask `need_rows` of all ids it is given from now on, for callers whose ids are made by others."""
    num_rows = num_embeddings(model)
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_pre_hook(lambda _module, args: need_rows(args[0], num_rows, tokenizer, where))


def _extremes(ids: torch.Tensor | Iterable[int]) -> tuple[int, int]:
    import torch

    if isinstance(ids, torch.Tensor):
        if ids.numel() == 0:
            return 0, 0
        low, high = torch.aminmax(ids)
        return int(high), int(low)
    listed = list(ids)
    return max(listed, default=0), min(listed, default=0)


@dataclass(frozen=True, slots=True)
class VocabularySide:
    """One of two models that are compared: what an error calls it, token -> id of its tokenizer, rows of its logits."""

    name: str
    tokens: Mapping[str, int]
    num_rows: int


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """size: rows of logits that both models have. note: what was cut off, None where nothing was."""

    size: int
    note: str | None


def shared_vocabulary(first: VocabularySide, second: VocabularySide) -> SharedVocabulary:
    """The rows of logits over which two models are compared: both distributions are taken over the first `size`.

    Raises: LLMCompressError when the tokenizers differ in any token, or a token has no row in one of the models.
    """
    if dict(first.tokens) != dict(second.tokens):
        differing = sorted(
            token
            for token in first.tokens.keys() | second.tokens.keys()
            if first.tokens.get(token) != second.tokens.get(token)
        )
        raise LLMCompressError(
            f"{first.name} and {second.name} have different tokenizers: {len(first.tokens)} tokens against "
            f"{len(second.tokens)}, {len(differing)} differ ({differing[0]!r} first)",
            "predictions can be compared over one vocabulary only: the same token must have the same id in both",
        )
    size = min(first.num_rows, second.num_rows)
    num_ids = max(first.tokens.values(), default=-1) + 1
    if size < num_ids:
        short = first if first.num_rows < second.num_rows else second
        raise LLMCompressError(
            f"{short.name}: has {short.num_rows} rows of logits, and its tokenizer has ids up to {num_ids - 1}", HINT
        )
    if first.num_rows == second.num_rows:
        return SharedVocabulary(size, None)
    larger = first if first.num_rows > second.num_rows else second
    note = (
        f"{first.name} and {second.name} have {first.num_rows} and {second.num_rows} rows of logits for the same "
        f"{len(first.tokens)} tokens; the {abs(first.num_rows - second.num_rows)} rows that only {larger.name} has are "
        "padding and were left out"
    )
    return SharedVocabulary(size, note)


def tokenizer_place(folder: Path) -> str:
    """How an error names a folder's tokenizer: by the file that holds its tokens."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return next((str(folder / name) for name in names if (folder / name).is_file()), str(folder))
