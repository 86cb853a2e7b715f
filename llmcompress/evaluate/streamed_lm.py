"""lm-eval's view of a model whose layers are read where they are reached: all requests of a task in one pass.

    requests ──> distinct inputs, longest first ──> batches ──┬─ layer 0, layer 1, … (models/streamed.py) ──┬─> scores
                 (choices of one token share one)             └─ every batch through a layer while it is there ┘

Tokens, windows and scores are HFLM's own; what differs is the order of the work: HFLM puts one batch through all
layers, here each layer sees all batches. The head computes the positions of continuations alone. Generation writes
token by token, each of which would read the whole model: it is refused.

Shapes: B rows of a batch, K last positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from llmcompress.errors import LLMCompressError
from llmcompress.evaluate.text import rows_at_once
from llmcompress.models.streamed import StreamedModel
from llmcompress.models.tasks import CAUSAL

NEEDS_MEMORY = "writes text token by token, which needs the whole model in memory, and this one is streamed"


class StreamedRequests:
    """What `harness.streamed_lm` puts before HFLM: log-likelihoods by a streamed model, as HFLM gives them.

    windows: lm-eval's cut of a text's tokens into (context, continuation), given the tokens, the first token and the
    longest input.
    """

    streamed: StreamedModel
    windows: Callable[[list[int], int, int], Iterable[tuple[list[int], list[int]]]]
    max_length: int
    batch_size: int
    prefix_token_id: int
    tok_encode: Callable[[str], list[int]]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:  # fmt: skip
        """(log-likelihood, whether greedy decoding writes it) of every continuation; context and it are tokens."""
        readers: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
            readers.setdefault(tuple(tokens), []).append(number)
        inputs = sorted(readers, key=lambda tokens: (-len(tokens), tokens))
        vocabulary = CAUSAL.num_predicted(self.streamed.model)
        at_once = rows_at_once(int(self.batch_size), max(map(len, inputs), default=1), vocabulary)
        groups = [inputs[start : start + at_once] for start in range(0, len(inputs), at_once)]
        batches, keep = [], []
        for group in groups:
            width = len(group[0])
            batches.append(torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in group]))
            starts = [len(tokens) - len(requests[number][2]) for tokens in group for number in readers[tokens]]
            keep.append(width - max(0, min(starts)))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for group, logits_BKV, num_kept in zip(groups, self.streamed.logits(batches, keep), keep, strict=True):
            cut_off = len(group[0]) - num_kept
            for row, logits_KV in zip(group, logits_BKV, strict=True):
                for number in readers[row]:
                    continuation = requests[number][2]
                    stop = len(row) - cut_off
                    scores[number] = _score(logits_KV[stop - len(continuation) : stop], continuation)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, over windows of the model's length; all windows in one pass."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for context, continuation in self.windows(self.tok_encode(text), self.prefix_token_id, self.max_length):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: see the module's docstring."""
        raise LLMCompressError(f"the task {NEEDS_MEMORY}", "leave it out, or evaluate where the model fits")


def _score(logits_KV: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    with torch.inference_mode():
        table_KV = torch.log_softmax(logits_KV, dim=-1)
        tokens_K = torch.tensor(continuation, device=table_KV.device)
        chosen_K = table_KV.gather(1, tokens_K[:, None])[:, 0]
        return float(chosen_K.sum()), bool((table_KV.argmax(-1) == tokens_K).all())
