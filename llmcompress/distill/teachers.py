"""What the teachers say of a batch: computed now, or read from the cache. The objective does not know which.

    online   batch ──> teacher 1, teacher 2 … ──> Mixture ──> log-probabilities over V tokens      + their insides
    cached   row numbers ─────────────────────> memory map ──> K tokens and all others together    (no insides)

Shapes: B rows of a batch, S tokens, V vocabulary, K tokens kept, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from llmcompress.distill.cache import TeacherCache
from llmcompress.distill.kinds import Kind
from llmcompress.distill.mixture import Combine, Mixture


@dataclass(frozen=True)
class Inside:
    """One teacher's hidden states (embeddings first), attention probabilities and pooled vectors, and its share."""

    share: float
    hidden: Sequence[torch.Tensor]
    attentions: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Answer:
    """What the teachers say. target: log-probabilities [B, S, V], or [B, S, K + 1] of the tokens `ids` and the rest."""

    target: torch.Tensor | None
    ids_BSK: torch.Tensor | None = None
    insides: Sequence[Inside] = field(default_factory=tuple)


class Source(Protocol):
    """Where a batch's answers come from."""

    def answer(self, inputs: Mapping[str, torch.Tensor], rows_B: torch.Tensor) -> Answer:
        """The answer for a batch; `rows_B` are the numbers of its rows in the training data."""
        ...


@dataclass(frozen=True)
class Teacher:
    """A teacher in memory."""

    name: str
    model: nn.Module
    share: float


@dataclass(frozen=True)
class Online:
    """Teachers that are run on every batch. `vocabulary`: rows of logits that teacher and student share."""

    teachers: Sequence[Teacher]
    kind: Kind
    vocabulary: int
    combine: Combine
    temperature: float
    hidden: bool
    attentions: bool

    def answer(self, inputs: Mapping[str, torch.Tensor], rows_B: torch.Tensor) -> Answer:
        """See `Source`."""
        mixture = Mixture(self.combine, self.temperature)
        insides = []
        with torch.no_grad():
            for teacher in self.teachers:
                output = run(teacher.model, inputs, self.kind, self.hidden, self.attentions)
                if self.kind != "embedding":
                    mixture.add(predictions(output, self.kind)[..., : self.vocabulary], teacher.share)
                if self.hidden or self.attentions:
                    insides.append(Inside(teacher.share, output.hidden_states or (), output.attentions or ()))
            target = None if self.kind == "embedding" else mixture.log_probs()
        return Answer(target, None, insides)


@dataclass(frozen=True)
class Cached:
    """Answers that lie on disk."""

    cache: TeacherCache
    device: torch.device

    def answer(self, inputs: Mapping[str, torch.Tensor], rows_B: torch.Tensor) -> Answer:
        """See `Source`."""
        length = self.cache.ids_NSK.shape[1] if "input_ids" not in inputs else inputs["input_ids"].shape[1]
        ids, target = self.cache.rows(rows_B, min(length, self.cache.ids_NSK.shape[1]))
        return Answer(target.to(self.device), ids.to(self.device))


def run(model: nn.Module, inputs: Mapping[str, torch.Tensor], kind: Kind, hidden: bool, attentions: bool) -> Any:
    """The model's own output on a batch; a causal model keeps no cache."""
    extra: dict[str, Any] = {"use_cache": False} if kind == "causal" else {}
    wanted = hidden or kind == "embedding"
    return model(**inputs, output_hidden_states=wanted, output_attentions=attentions, **extra)


def predictions(output: Any, kind: Kind) -> torch.Tensor:
    """Logits [B, S, V]; of a classifier [B, 1, classes]."""
    logits: torch.Tensor = output.logits
    return logits[:, None] if kind == "classification" else logits


def pooled(hidden_BSH: torch.Tensor, mask_BS: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per text [B, H]: the mean over its tokens, or its first token's; not normalized."""
    if pooling == "first":
        return hidden_BSH[:, 0]
    mask_BS1 = mask_BS[..., None].to(hidden_BSH.dtype)
    return (hidden_BSH * mask_BS1).sum(1) / mask_BS1.sum(1).clamp_min(1)
