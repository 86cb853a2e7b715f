"""Held-out text through both models: perplexity of each, and how far apart their predictions are.

Perplexity asks what a model gave to the one token that came next. KL(baseline || compressed) asks about the whole
distribution over the vocabulary, so it sees damage that happens to leave the true token's share alone, and it needs far
less text to tell two checkpoints apart.

    tokens_NS ──> baseline   ──> log p (V) ─┐ at every position      nll = -log p[next]
              └─> compressed ──> log q (V) ─┘                        kl  = sum_v p_v (log p_v - log q_v)

Both models see the same batches. Logits are taken as the models give them; the softmax and the sums are float64, a few
positions at a time, so the memory beside the two forwards does not depend on the length of the rows.

Shapes: N rows, B rows of a batch, S tokens of a row, T positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.statistics import Floats

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 32 << 20
"""Size of one float64 [T, V] table; four of them live at once."""
MIN_ROWS = 2
"""An interval over rows needs more than one."""
LOGITS_BYTES = 512 << 20
"""Size of the float32 logits [B, S, V] of one model's batch, where more than one row would exceed it."""


@dataclass(frozen=True, slots=True)
class RowStats:
    """Means over the predicted tokens of each row, float64 [N] each; every row predicts `tokens_per_row` tokens."""

    baseline_nll_N: Floats
    compressed_nll_N: Floats
    kl_N: Floats
    agreement_N: Floats
    tokens_per_row: int


def read_text(path: Path, field: str) -> str:
    """The text of a .txt file, or the `field` of every line of a .jsonl file, an empty line between two.

    Raises: LLMCompressError for a file that is empty, is not UTF-8, or has a line without that field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LLMCompressError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        text = "\n\n".join(_field(path, number, line, field) for number, line in lines)
    if not text.strip():
        raise LLMCompressError(f"{path}: holds no text")
    return text


def _field(path: Path, number: int, line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise LLMCompressError(f"{path}:{number}: not valid JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        known = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise LLMCompressError(f"{path}:{number}: has no text in field {field!r} (it has: {known})")
    return str(record[field])


def token_rows(text: str, tokenizer: Any, seq_len: int, num_tokens: int, where: str) -> torch.Tensor:
    """The first `num_tokens` tokens of `text` at most, as full rows: int64 [N, S], the rest of a row left out.

    Where the tokenizer puts a beginning-of-sequence token before text, every row starts with one.

    Raises: LLMCompressError when the text does not fill two rows, the least that an interval can be taken over.
    """
    import torch

    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    start = first if first and first[0] == tokenizer.bos_token_id else []
    width = seq_len - len(start)
    num_rows = min(len(tokens), num_tokens) // width
    if num_rows < MIN_ROWS:
        raise LLMCompressError(
            f"{where}: {len(tokens)} tokens fill {num_rows} rows of seq_len {seq_len}; at least {MIN_ROWS} are needed",
            "use a longer text or a smaller seq_len",
        )
    rows = [start + tokens[index * width : (index + 1) * width] for index in range(num_rows)]
    return torch.tensor(rows, dtype=torch.int64)


def rows_at_once(batch_size: int, seq_len: int, vocab_size: int) -> int:
    """How many rows go through the models together: `batch_size`, or fewer where their logits would be too large.

    >>> rows_at_once(8, 256, 4096), rows_at_once(8, 2048, 150_000)
    (8, 1)
    """
    return max(1, min(batch_size, LOGITS_BYTES // (4 * seq_len * vocab_size)))


def compare_rows(
    baseline: Any,
    compressed: Any,
    tokens_NS: torch.Tensor,
    batch_size: int,
    on_rows: Callable[[int], None] = lambda _: None,
    entries: int | None = None,
) -> RowStats:
    """Both models over the same rows, `batch_size` rows at a time; `on_rows` hears how many rows were done.

    The models are called as `model(input_ids=tokens_BS, use_cache=False).logits`, [B, S, V]. entries: of the vocabulary
    that are compared, the first so many (None: all, which must be the same); both distributions are taken over them.

    Raises: LLMCompressError when the vocabularies differ or a model gives logits that are not finite.
    """
    import torch

    parts: list[Floats] = []
    with torch.inference_mode():
        for start in range(0, len(tokens_NS), batch_size):
            tokens_BS = tokens_NS[start : start + batch_size]
            base_BSV = baseline(input_ids=tokens_BS.to(baseline.device), use_cache=False).logits[..., :entries]
            comp_BSV = compressed(input_ids=tokens_BS.to(compressed.device), use_cache=False).logits[..., :entries]
            if base_BSV.shape != comp_BSV.shape:
                raise LLMCompressError(
                    f"the models have different vocabularies: {base_BSV.shape[-1]} entries and {comp_BSV.shape[-1]}"
                )
            for index, tokens_S in enumerate(tokens_BS):
                part = _row(base_BSV[index, :-1], comp_BSV[index, :-1].to(base_BSV.device), tokens_S[1:])
                _check_finite(part, start + index)
                parts.append(part)
            on_rows(len(tokens_BS))
    nll_base_N, nll_comp_N, kl_N, agree_N = np.array(parts).T
    return RowStats(nll_base_N, nll_comp_N, kl_N, agree_N, tokens_NS.shape[1] - 1)


def shared_entries(widths: tuple[int, int], tokens: tuple[dict[str, int], dict[str, int]]) -> int | None:
    """How many entries of the vocabulary two models share that differ in padding rows alone; None: all, none differ.

    widths: entries of the logits of baseline and compressed model. tokens: token -> id of their tokenizers.

    Raises: LLMCompressError where the tokenizers differ too, or a token has no row in one of the models.
    """
    if widths[0] == widths[1]:
        return None
    shared, needed = min(widths), max(tokens[0].values(), default=-1) + 1
    if tokens[0] != tokens[1] or needed > shared:
        raise LLMCompressError(
            f"the models have different vocabularies: {widths[0]} entries and {widths[1]}, for {len(tokens[0])} tokens "
            f"and {len(tokens[1])}",
            "models can be compared that differ in padding rows alone: the same tokens, each with a row in both",
        )
    return shared


def _row(base_SV: torch.Tensor, comp_SV: torch.Tensor, next_S: torch.Tensor) -> Floats:
    """Means over one row: [baseline nll, compressed nll, KL, agreement], float64 [4]."""
    chunk = max(1, CHUNK_BYTES // (8 * base_SV.shape[1]))
    sums = np.zeros(4)
    for start in range(0, len(next_S), chunk):
        base_TV = base_SV[start : start + chunk].double().log_softmax(-1)
        comp_TV = comp_SV[start : start + chunk].double().log_softmax(-1)
        next_T1 = next_S[start : start + chunk, None].to(base_TV.device)
        sums += (
            -float(base_TV.gather(1, next_T1).sum()),
            -float(comp_TV.gather(1, next_T1).sum()),
            float((base_TV.exp() * (base_TV - comp_TV)).sum()),
            float((base_TV.argmax(-1) == comp_TV.argmax(-1)).sum()),
        )
    return sums / len(next_S)


def _check_finite(part: Floats, row: int) -> None:
    for which, nll in (("baseline", part[0]), ("compressed model", part[1])):
        if not np.isfinite(nll):
            raise LLMCompressError(f"row {row}: the {which} gives logits that are not finite (NaN or Inf)")
    if not np.isfinite(part[2]):
        raise LLMCompressError(f"row {row}: a model gives logits that are not finite (NaN or Inf)")
