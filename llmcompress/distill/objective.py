"""The student together with what it is asked to match, as one module whose forward gives the loss.

    batch ──> student ──> logits, hidden, attentions ─┐
          └─> Teachers ─> target, intermediates ──────┴─> one value per loss ──> weights ──> their sum

    tokens that count    predictions: causal: those whose next token has a label (no padding, no prompt); masked: all
                                      real tokens for the teacher, the masked ones for the labels
                         hidden states and attention: of a causal model the same tokens, else all real ones

So any trainer that backpropagates `output["loss"]` trains it. Projections, where the teacher is wider, are parameters
of this module and not of the student. In two phases (TinyBERT), the first `phase_frac` of the steps trains on the
hidden states and attention alone and the rest on the predictions alone.

Shapes: B rows of a batch, S tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from llmcompress.distill import losses
from llmcompress.distill.layer_map import Pairs
from llmcompress.distill.settings import ATTENTION, HIDDEN, INTERMEDIATE
from llmcompress.distill.teachers import Intermediates, Predictions, PredictionSource, pooled
from llmcompress.models.tasks import Task

NOT_INPUTS = ("labels", "row", "prompts", "prompt_attention_mask")


@dataclass(frozen=True)
class Objective:
    """Weights of the losses, and the numbers they need. maps: one layer map per teacher."""

    task: Task
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
        return weight if (name in INTERMEDIATE) == (progress < self.phase_frac) else 0.0


class Distiller(nn.Module):
    """The student and its objective; see the module's docstring. `progress` is set by the training loop, 0 to 1."""

    accepts_loss_kwargs = False

    def __init__(
        self,
        student: nn.Module,
        source: PredictionSource | None,
        objective: Objective,
        widths: Sequence[tuple[int, int]],
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
        output = of.task.run(student, inputs, of.needs(HIDDEN), of.needs(ATTENTION))
        source = self._source[0]
        predicted = source.predict(inputs, batch["row"]) if source is not None else Predictions(None)
        parts = self._prediction_losses(output, predicted, batch)
        for index, teacher in enumerate(predicted.intermediates):
            counts_BS = of.task.tokens_that_count(batch)
            for name, value in self._intermediate_losses(output, teacher, index, counts_BS).items():
                parts[name] = parts.get(name, torch.zeros(())) + teacher.share * value
        self.parts = {name: value.detach() for name, value in parts.items()}
        total = sum((of.weight(name, self.progress) * value for name, value in parts.items()), torch.zeros(()))
        return {"loss": total}

    def _prediction_losses(
        self, output: Any, predicted: Predictions, batch: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        of = self.objective
        logits_BSV = of.task.predictions(output)
        if logits_BSV is None:
            return {"sentence": self._sentence_loss(output, predicted, batch)} if of.needs(("sentence",)) else {}
        logits_BSV = logits_BSV[..., : of.vocabulary]
        counts_BS, labels_BS = of.task.targets(batch)
        parts: dict[str, torch.Tensor] = {}
        divergences: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "forward_kl": losses.forward_kl,
            "reverse_kl": losses.reverse_kl,
            "js": partial(losses.jensen_shannon, beta=of.beta),
        }
        if predicted.target is not None and of.needs(tuple(divergences)):
            student = losses.log_probs(logits_BSV, of.temperature)
            target = predicted.target[:, : student.shape[1]]
            if predicted.ids_BSK is not None:
                student = losses.folded(student, predicted.ids_BSK[:, : student.shape[1]])
            for name, divergence in divergences.items():
                if of.needs((name,)):
                    loss_BS = losses.tempered(divergence(student, target), of.temperature)
                    parts[name] = losses.masked_mean(loss_BS, counts_BS)
        if of.needs(("ce",)):
            loss_T = losses.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
            parts["ce"] = losses.masked_mean(loss_T, labels_BS.flatten() != -100)
        return parts

    def _sentence_loss(self, output: Any, predicted: Predictions, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """1 - cosine of the pooled vectors, mean over the batch and weighted over the teachers."""
        mask_BS = batch["attention_mask"]
        student_BH = pooled(output.hidden_states[-1], mask_BS, self.objective.pooling)
        total = torch.zeros(())
        for index, teacher in enumerate(predicted.intermediates):
            teacher_BH = pooled(teacher.hidden[-1], mask_BS, self.objective.pooling)
            total = total + teacher.share * losses.hidden_cosine(self._projected(student_BH, index), teacher_BH).mean()
        return total

    def _projected(self, hidden: torch.Tensor, teacher: int) -> torch.Tensor:
        key = str(teacher)
        return self.projections[key](hidden) if key in self.projections else hidden

    def _intermediate_losses(
        self, output: Any, teacher: Intermediates, index: int, counts_BS: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        of = self.objective
        parts: dict[str, torch.Tensor] = {}
        pairs = of.maps[index] if of.maps else ()
        if of.needs(("embedding",)):
            embedded = losses.hidden_mse(self._projected(output.hidden_states[0], index), teacher.hidden[0])
            parts["embedding"] = losses.masked_mean(embedded, counts_BS)
        for name, hidden_loss in (("hidden_mse", losses.hidden_mse), ("hidden_cosine", losses.hidden_cosine)):
            if of.needs((name,)):
                values = [
                    hidden_loss(self._projected(output.hidden_states[mine + 1], index), teacher.hidden[theirs + 1])
                    for mine, theirs in pairs
                ]
                parts[name] = losses.masked_mean(torch.stack(values).mean(0), counts_BS)
        for name, attention_loss in (("attention_kl", losses.attention_kl), ("attention_mse", losses.attention_mse)):
            if of.needs((name,)):
                values = [
                    attention_loss(*same_heads(output.attentions[mine], teacher.attentions[theirs]))
                    for mine, theirs in pairs
                ]
                parts[name] = losses.masked_mean(torch.stack(values).mean(0), counts_BS)
        return parts


def same_heads(student_BASS: torch.Tensor, teacher_BASS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as they are, or each as the mean over its heads where their numbers differ."""
    if student_BASS.shape[1] == teacher_BASS.shape[1]:
        return student_BASS, teacher_BASS
    return student_BASS.mean(1, keepdim=True), teacher_BASS.mean(1, keepdim=True)
