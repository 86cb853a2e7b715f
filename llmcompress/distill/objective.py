"""The student together with what it is asked to match, as one module whose forward gives the loss.

    batch ──> student ──> logits, hidden, attentions ─┐
          └─> Source  ──> target, insides ────────────┴─> one value per loss ──> weights ──> their sum

    tokens that count    predictions: causal: those whose next token has a label (no padding, no prompt); masked: all
                                      real tokens for the teacher, the masked ones for the labels
                         insides:     the same tokens

So any trainer that backpropagates `output["loss"]` trains it. Projections, where the teacher is wider, are parameters
of this module and not of the student. In two phases (TinyBERT), the first `phase_frac` of the steps trains on the
insides alone and the rest on the predictions alone.

Shapes: B rows of a batch, S tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmcompress.distill import losses, topk
from llmcompress.distill.kinds import Kind
from llmcompress.distill.layer_map import Pairs
from llmcompress.distill.teachers import Answer, Inside, Source, pooled, predictions, run

PREDICTION = ("forward_kl", "reverse_kl", "js", "ce", "sentence")
INSIDE = ("hidden_mse", "hidden_cosine", "attention_kl", "attention_mse", "embedding")
HIDDEN, ATTENTION = ("hidden_mse", "hidden_cosine", "embedding"), ("attention_kl", "attention_mse")
NOT_INPUTS = ("labels", "row", "prompts", "prompt_attention_mask")


@dataclass(frozen=True)
class Objective:
    """Weights of the losses, and the numbers they need. maps: one layer map per teacher."""

    kind: Kind
    weights: Mapping[str, float]
    temperature: float = 1.0
    beta: float = 0.5
    maps: Sequence[Pairs] = ()
    vocabulary: int = 0
    pooling: str = "mean"
    phase_frac: float = 0.0

    def needs(self, names: Sequence[str]) -> bool:
        """Whether any of these losses has a weight."""
        return any(self.weights.get(name, 0) > 0 for name in names)

    def weight(self, name: str, progress: float) -> float:
        """The weight of a loss when `progress` of the steps, 0 to 1, are done."""
        weight = self.weights.get(name, 0.0)
        if self.phase_frac == 0:
            return weight
        return weight if (name in INSIDE) == (progress < self.phase_frac) else 0.0


class Distiller(nn.Module):
    """The student and its objective; see the module's docstring. `progress` is set by the training loop, 0 to 1."""

    accepts_loss_kwargs = False

    def __init__(
        self, student: nn.Module, source: Source | None, objective: Objective, widths: Sequence[tuple[int, int]]
    ) -> None:
        """widths: hidden sizes (student, teacher) per teacher."""
        super().__init__()
        self.student, self.objective = student, objective
        self._source = (source,)  # in a tuple, so that teachers are no part of this module's state
        self.progress = 0.0
        self.parts: dict[str, torch.Tensor] = {}
        self.projections = nn.ModuleDict()
        if objective.needs((*HIDDEN, "sentence")):
            for index, (narrow, wide) in enumerate(widths):
                if narrow != wide:
                    self.projections[str(index)] = nn.Linear(narrow, wide, bias=False)

    @property
    def config(self) -> Any:
        """The student's config, which trainers look for."""
        return self.student.config

    def gradient_checkpointing_enable(self, **how: Any) -> None:
        """The student's own, for a trainer that asks for it."""
        self.student.gradient_checkpointing_enable(**how)  # type: ignore[operator]

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """`loss`, the weighted sum, a scalar. batch: the model's inputs, and `labels` and `row`."""
        return self.loss(self.student, batch)

    def loss(self, student: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `forward`. student: this module's, or what a trainer wrapped it in."""
        of = self.objective
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        output = run(student, inputs, of.kind, of.needs(HIDDEN), of.needs(ATTENTION))
        source = self._source[0]
        answer = source.answer(inputs, batch["row"]) if source is not None else Answer(None)
        parts = self._predicted(output, answer, batch)
        for index, inside in enumerate(answer.insides):
            for name, value in self._inside(output, inside, index, inside_counts(of.kind, batch)).items():
                parts[name] = parts.get(name, torch.zeros(())) + inside.share * value
        self.parts = {name: value.detach() for name, value in parts.items()}
        total = sum((of.weight(name, self.progress) * value for name, value in parts.items()), torch.zeros(()))
        return {"loss": total}

    def _predicted(self, output: Any, answer: Answer, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        of = self.objective
        if of.kind == "embedding":
            return {"sentence": self._sentence(output, answer, batch)} if of.needs(("sentence",)) else {}
        logits_BSV = predictions(output, of.kind)[..., : of.vocabulary]
        counts_BS, labels_BS = labels_in_step(of.kind, batch)
        parts: dict[str, torch.Tensor] = {}
        if answer.target is not None and of.needs(("forward_kl", "reverse_kl", "js")):
            student = losses.log_probs(logits_BSV, of.temperature)
            target = answer.target[:, : student.shape[1]]
            if answer.ids_BSK is not None:
                student = topk.folded(student, answer.ids_BSK[:, : student.shape[1]])
            named = {"forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl}
            for name in ("forward_kl", "reverse_kl", "js"):
                if of.needs((name,)):
                    divergence = (
                        losses.jensen_shannon(student, target, of.beta)
                        if name == "js"
                        else named[name](student, target)
                    )
                    parts[name] = losses.masked_mean(losses.tempered(divergence, of.temperature), counts_BS)
        if of.needs(("ce",)):
            loss_T = losses.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
            parts["ce"] = losses.masked_mean(loss_T, labels_BS.flatten() != -100)
        return parts

    def _sentence(self, output: Any, answer: Answer, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """1 - cosine of the pooled vectors, mean over the batch and weighted over the teachers."""
        mask_BS = batch["attention_mask"]
        student_BH = pooled(output.hidden_states[-1], mask_BS, self.objective.pooling)
        total = torch.zeros(())
        for index, inside in enumerate(answer.insides):
            teacher_BH = pooled(inside.hidden[-1], mask_BS, self.objective.pooling)
            total = total + inside.share * losses.hidden_cosine(self._wide(student_BH, index), teacher_BH).mean()
        return total

    def _wide(self, hidden: torch.Tensor, teacher: int) -> torch.Tensor:
        key = str(teacher)
        return self.projections[key](hidden) if key in self.projections else hidden

    def _inside(self, output: Any, inside: Inside, index: int, counts_BS: torch.Tensor) -> dict[str, torch.Tensor]:
        of = self.objective
        parts: dict[str, torch.Tensor] = {}
        pairs = of.maps[index] if of.maps else ()
        if of.needs(("embedding",)):
            embedded = losses.hidden_mse(self._wide(output.hidden_states[0], index), inside.hidden[0])
            parts["embedding"] = losses.masked_mean(embedded, counts_BS)
        for name, hidden_loss in (("hidden_mse", losses.hidden_mse), ("hidden_cosine", losses.hidden_cosine)):
            if of.needs((name,)):
                values = [
                    hidden_loss(self._wide(output.hidden_states[mine + 1], index), inside.hidden[theirs + 1])
                    for mine, theirs in pairs
                ]
                parts[name] = losses.masked_mean(torch.stack(values).mean(0), counts_BS)
        for name, attention_loss in (("attention_kl", losses.attention_kl), ("attention_mse", losses.attention_mse)):
            if of.needs((name,)):
                values = [
                    attention_loss(*same_heads(output.attentions[mine], inside.attentions[theirs]))
                    for mine, theirs in pairs
                ]
                parts[name] = losses.masked_mean(torch.stack(values).mean(0), counts_BS)
        return parts


def same_heads(student_BASS: torch.Tensor, teacher_BASS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as they are, or each as the mean over its heads where their numbers differ."""
    if student_BASS.shape[1] == teacher_BASS.shape[1]:
        return student_BASS, teacher_BASS
    return student_BASS.mean(1, keepdim=True), teacher_BASS.mean(1, keepdim=True)


def labels_in_step(kind: Kind, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(predictions that count bool [B, S], labels [B, S]), in step with the logits; a classifier's S is 1.

    A causal model predicts the next token: its labels move one to the left.
    """
    labels = batch["labels"]
    if kind == "classification":
        labels_B1 = labels.reshape(-1, 1)
        return torch.ones_like(labels_B1, dtype=torch.bool), labels_B1
    if kind == "masked":
        return batch["attention_mask"].bool(), labels
    moved = torch.full_like(labels, -100)
    moved[:, :-1] = labels[:, 1:]
    return moved != -100, moved


def inside_counts(kind: Kind, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Tokens whose hidden states and attention count, bool [B, S]."""
    return labels_in_step(kind, batch)[0] if kind == "causal" else batch["attention_mask"].bool()
