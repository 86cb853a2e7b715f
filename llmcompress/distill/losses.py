"""What a student is asked to match, each as a small function of tensors and numbers.

    predictions   forward KL   D(p || q)     covers every mode of the teacher          Hinton et al. 2015
                  reverse KL   D(q || p)     keeps to its largest mode                 MiniLLM, Gu et al. 2024
                  JS(beta)     beta D(p || m) + (1 - beta) D(q || m)                   GKD, Agarwal et al. 2024
                               with m = beta p + (1 - beta) q
                  CE           -log q(label)   the data's own next token or class
    intermediate  hidden       MSE or 1 - cosine, projected where the widths differ     FitNets, TinyBERT
                  attention    KL or MSE of the attention probabilities              TinyBERT
                  embedding    hidden, of what the embedding layer gives

p is the teacher's distribution, q the student's, both of logits over a temperature. Softer distributions have smaller
gradients, by 1/temperature^2, which `tempered` gives back so that the weights of losses keep their meaning.

Several teachers are one distribution (`Mixture`); weights are divided by their sum:

    probabilities   p = sum_i w_i p_i                  an ensemble: likely is what any teacher finds likely
    logits          p = softmax(sum_i w_i z_i / t)     a product of experts: likely is what all of them do

A teacher that was cached is kept as its K likeliest tokens and the exact mass of all others (`fold`):

    [ p1  p2  ...  pK | rest ]        rest = 1 - (p1 + ... + pK), computed from the whole distribution

The student is folded the same way (its own probability of the same K tokens, and its own rest), and any divergence of
the two folded distributions is taken over K + 1 outcomes. Folding never adds to a divergence (data processing), and for
the forward KL the chain rule says what it takes away:

    online - cached = rest * KL(teacher's tail || student's tail)        between 0 and rest * log(1 / least of the
                                                                         student's tail probabilities)

The gradient with respect to the student's logits moves by at most 2 * rest / temperature in L1 norm (times
temperature^2, as all of the loss is), whatever the student is: `rest` is what the report states.

Every function gives one value per token and takes no mean: `masked_mean` is the one place where tokens that do not
count (padding, the prompt) are left out.

Shapes: T tokens, V vocabulary (or the K + 1 outcomes of a teacher that was cached), H hidden size, A heads, S length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import distributed
from torch.nn import functional

from llmcompress.models.divergence import LOWEST, floored_kl

Combine = Literal["probabilities", "logits"]


def log_probs(logits_TV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [T, V] of logits over `temperature`, in float32 at least."""
    wide = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return (wide / temperature).log_softmax(-1)


def forward_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of log-probabilities, nats [T]."""
    return floored_kl(teacher_TV, student_TV)


def reverse_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of log-probabilities, nats [T]."""
    return floored_kl(student_TV, teacher_TV)


def jensen_shannon(student_TV: torch.Tensor, teacher_TV: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence of log-probabilities, nats [T], at most the entropy of (beta, 1 - beta).

    0 < beta < 1. Over beta, it tends to the forward KL as beta goes to 0; over 1 - beta, to the reverse as beta does
    to 1.
    """
    assert 0 < beta < 1
    mixed_TV = torch.logaddexp(teacher_TV + math.log(beta), student_TV + math.log1p(-beta))
    return beta * floored_kl(teacher_TV, mixed_TV) + (1 - beta) * floored_kl(student_TV, mixed_TV)


def tempered(loss_T: torch.Tensor, temperature: float) -> torch.Tensor:
    """A divergence of tempered distributions, times temperature^2 (Hinton et al. 2015, section 2)."""
    return loss_T * temperature**2


def cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """-log q(label), nats [T]; labels outside the vocabulary (-100 on tokens that do not count) give 0."""
    wide = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return functional.cross_entropy(wide, labels_T, ignore_index=-100, reduction="none")


def hidden_mse(student_TH: torch.Tensor, teacher_TH: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the hidden size, [T]."""
    return (student_TH.float() - teacher_TH.float()).square().mean(-1)


def hidden_cosine(student_TH: torch.Tensor, teacher_TH: torch.Tensor) -> torch.Tensor:
    """1 - cosine of the two vectors, [T], between 0 and 2."""
    return 1 - functional.cosine_similarity(student_TH.float(), teacher_TH.float(), dim=-1)


def attention_kl(student_BASS: torch.Tensor, teacher_BASS: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of attention probabilities, mean over heads: nats [B, S], one per query."""
    smallest = torch.finfo(torch.float32).tiny
    student, teacher = (x.float().clamp_min(smallest).log() for x in (student_BASS, teacher_BASS))
    return (teacher_BASS.float() * (teacher - student)).sum(-1).mean(1)


def attention_mse(student_BASS: torch.Tensor, teacher_BASS: torch.Tensor) -> torch.Tensor:
    """Squared difference of attention probabilities, summed over keys and meaned over heads: [B, S], one per query.

    Summed, because a mean over keys would count the zeros of a causal mask and of padding.
    """
    return (student_BASS.float() - teacher_BASS.float()).square().sum(-1).mean(1)


def masked_mean(values_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Mean of the values whose mask is true; 0 where there are none. The others never count, be they NaN.

    Where several processes train together, the sum is over the tokens per process on average, so that the mean over
    processes, which their gradients are, is the mean over the tokens of all of them.
    """
    kept = values_T.masked_fill(~mask_T, 0)
    return kept.sum() / _tokens_per_process(mask_T.sum()).clamp_min(1e-6)


def _tokens_per_process(count: torch.Tensor) -> torch.Tensor:
    total = count.float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        total = total / distributed.get_world_size()
    return total


def fold(log_probs_TV: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [T, K], log-probabilities [T, K + 1], the last one that of all other tokens together)."""
    ids_TK = log_probs_TV.topk(min(num_kept, log_probs_TV.shape[-1]), dim=-1).indices
    return ids_TK, folded(log_probs_TV, ids_TK)


def folded(log_probs_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [T, K + 1] of the tokens `ids_TK` and of all others together. Differentiable."""
    kept_TK = log_probs_TV.gather(-1, ids_TK)
    rest_T1 = log_probs_TV.scatter(-1, ids_TK, LOWEST).logsumexp(-1, keepdim=True)
    return torch.cat([kept_TK, rest_T1], -1)


def tail_bound(student_TV: torch.Tensor, ids_TK: torch.Tensor, teacher_TK1: torch.Tensor) -> torch.Tensor:
    """The most that the online forward KL can exceed the cached one, nats [T].

    student_TV: log-probabilities. It is rest * (log of the student's whole tail - log of its least likely tail token).
    """
    tail_TV = student_TV.scatter(-1, ids_TK, float("inf"))
    least_T = tail_TV.amin(-1)
    whole_T = folded(student_TV, ids_TK)[..., -1]
    bound_T = teacher_TK1[..., -1].exp() * (whole_T - least_T)
    return torch.where(least_T.isinf(), torch.zeros_like(bound_T), bound_T)


class Mixture:
    """Adds up teachers one at a time, so that only one of them need be in memory."""

    def __init__(self, combine: Combine, temperature: float) -> None:
        self.combine, self.temperature = combine, temperature
        self._sum_TV: torch.Tensor | None = None

    def add(self, logits_TV: torch.Tensor, share: float) -> None:
        """One teacher's logits with its share of the whole, 0 < share <= 1."""
        if self.combine == "logits":
            term_TV = logits_TV.float() * share if share != 1.0 else logits_TV.float()
            self._sum_TV = term_TV if self._sum_TV is None else self._sum_TV + term_TV
            return
        term_TV = log_probs(logits_TV, self.temperature)
        term_TV = term_TV + math.log(share) if share != 1.0 else term_TV
        self._sum_TV = term_TV if self._sum_TV is None else torch.logaddexp(self._sum_TV, term_TV)

    def log_probs(self) -> torch.Tensor:
        """The mixture's log-probabilities [T, V], tempered."""
        assert self._sum_TV is not None, "a mixture of nothing"
        return log_probs(self._sum_TV, self.temperature) if self.combine == "logits" else self._sum_TV


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights over their sum. At least one is positive and none negative.

    >>> shares([1, 3]), shares([0, 2])
    ((0.25, 0.75), (0.0, 1.0))
    """
    total = math.fsum(weights)
    assert total > 0 and min(weights) >= 0
    return tuple(weight / total for weight in weights)
