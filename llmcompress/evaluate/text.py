"""Held-out text through both models, at every token the figures of text_metrics.py.

    tokens_NS ──> baseline   ──> log p (V) ─┐ token by token, in one pass   perplexity
              └─> compressed ──> log q (V) ─┘                               KL, same top-1 token, …

Both models see the same batches. Logits are taken as the models give them; softmax and sums are float64, a few tokens
at a time, so the memory beside the two forwards does not depend on the length of the rows.

Shapes: N rows, B rows of a batch, S tokens of a row, T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcompress.data.sources import read_text as read_text
from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.statistics import Floats
from llmcompress.evaluate.text_metrics import TEXT_METRICS

if TYPE_CHECKING:
    import torch

MIN_ROWS = 2
"""An interval over rows needs more than one."""
LOGITS_BYTES = 512 << 20
"""Size of the float32 logits [B, S, V] of one model's batch, where more than one row would exceed it."""
Forward = Callable[[Sequence["torch.Tensor"]], Iterable["torch.Tensor"]]
"""A model: batches of tokens [B, S] -> next-token logits [B, S, V] of each, computed as they are asked for."""


@dataclass(frozen=True, slots=True)
class RowFigures:
    """One metric: its mean over the predicted tokens of each row, float64 [N]. Of a metric of one model also each
    model's, and `pair_N` is their difference."""

    pair_N: Floats
    baseline_N: Floats | None = None
    compressed_N: Floats | None = None


@dataclass(frozen=True, slots=True)
class TextFigures:
    """Every metric by name; every row predicts `tokens_per_row` tokens."""

    by_metric: dict[str, RowFigures]
    tokens_per_row: int

    @property
    def num_tokens(self) -> int:
        """Predicted tokens in all."""
        return self.tokens_per_row * len(next(iter(self.by_metric.values())).pair_N)


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
    baseline: Forward,
    compressed: Forward,
    tokens_NS: torch.Tensor,
    batch_size: int,
    on_rows: Callable[[int], None] = lambda _: None,
    entries: int | None = None,
) -> TextFigures:
    """Both models over the same rows, `batch_size` rows at a time; `on_rows` hears how many rows were done.

    entries: of the vocabulary that are compared, the first so many (None: all, which must be the same); both
    distributions are taken over them.

    Raises: LLMCompressError when the vocabularies differ or a model gives logits that are not finite.
    """
    rows: list[Floats] = []
    batches = tokens_NS.split(batch_size)
    for tokens_BS, base_BSV, comp_BSV in zip(batches, baseline(batches), compressed(batches), strict=True):
        base_BSV, comp_BSV = base_BSV[..., :entries], comp_BSV[..., :entries]
        if base_BSV.shape != comp_BSV.shape:
            raise LLMCompressError(
                f"the models have different vocabularies: {base_BSV.shape[-1]} entries and {comp_BSV.shape[-1]}"
            )
        for index, tokens_S in enumerate(tokens_BS):
            rows.append(_row(base_BSV[index, :-1], comp_BSV[index, :-1], tokens_S[1:], len(rows)))
        on_rows(len(tokens_BS))
    return TextFigures(_by_metric(np.array(rows)), tokens_NS.shape[1] - 1)


def _row(base_SV: torch.Tensor, comp_SV: torch.Tensor, next_S: torch.Tensor, row: int) -> Floats:
    """Means over one row, float64: for every metric (baseline, compressed), or (pair, 0)."""
    import torch

    from llmcompress.models.divergence import tables

    sums = np.zeros((len(TEXT_METRICS), 2))
    with torch.inference_mode():
        for tokens, base_TV, comp_TV in tables(base_SV, comp_SV):
            for which, table_TV in (("baseline", base_TV), ("compressed model", comp_TV)):
                if not bool(torch.isfinite(table_TV).all()):
                    raise LLMCompressError(f"row {row}: the {which} gives logits that are not finite (NaN or Inf)")
            next_T = next_S[tokens].to(base_TV.device)
            for number, metric in enumerate(TEXT_METRICS):
                if metric.of_one is not None:
                    sums[number] += [float(metric.of_one(table_TV, next_T).sum()) for table_TV in (base_TV, comp_TV)]
                elif metric.of_both is not None:
                    sums[number, 0] += float(metric.of_both(base_TV, comp_TV).sum())
    means: Floats = sums / len(next_S)
    return means


def _by_metric(figures_NM2: Floats) -> dict[str, RowFigures]:
    by_metric = {}
    for number, metric in enumerate(TEXT_METRICS):
        first_N, second_N = figures_NM2[:, number].T
        one = metric.of_one is not None
        by_metric[metric.name] = RowFigures(second_N - first_N, first_N, second_N) if one else RowFigures(first_N)
    return by_metric
