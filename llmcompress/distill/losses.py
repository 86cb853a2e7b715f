"""What a student is asked to match, each as a small function of tensors and numbers.

    predictions   forward KL   D(p || q)     covers every mode of the teacher          Hinton et al. 2015
                  reverse KL   D(q || p)     keeps to its largest mode                 MiniLLM, Gu et al. 2024
                  JS(beta)     beta D(p || m) + (1 - beta) D(q || m)                   GKD, Agarwal et al. 2024
                               with m = beta p + (1 - beta) q
                  CE           -log q(label)   the data's own next token or class
    inside        hidden       MSE or 1 - cosine, projected where the widths differ     FitNets, TinyBERT
                  attention    KL or MSE of the attention probabilities              TinyBERT
                  embedding    hidden, of what the embedding layer gives

p is the teacher's distribution, q the student's, both of logits over a temperature. Softer distributions have smaller
gradients, by 1/temperature^2, which `tempered` gives back so that the weights of losses keep their meaning.

Every function gives one value per token and takes no mean: `masked_mean` is the one place where tokens that do not
count (padding, the prompt) are left out.

Shapes: T tokens, V vocabulary (or the K + 1 outcomes of a teacher that was cached), H hidden size, A heads, S length.
"""

from __future__ import annotations

import math

import torch
from torch import distributed
from torch.nn import functional

LOWEST = -1e4
"""Stands for the logarithm of zero: exp of it is zero, and a product with zero stays zero where -inf would give NaN."""


def log_probs(logits_TV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [T, V] of logits over `temperature`, in float32 at least."""
    wide = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return (wide / temperature).log_softmax(-1)


def forward_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of log-probabilities, nats [T]."""
    return _kl(teacher_TV, student_TV)


def reverse_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of log-probabilities, nats [T]."""
    return _kl(student_TV, teacher_TV)


def jensen_shannon(student_TV: torch.Tensor, teacher_TV: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence of log-probabilities, nats [T], at most the entropy of (beta, 1 - beta).

    0 < beta < 1. Over beta, it tends to the forward KL as beta goes to 0; over 1 - beta, to the reverse as beta does
    to 1.
    """
    assert 0 < beta < 1
    mixed_TV = torch.logaddexp(teacher_TV + math.log(beta), student_TV + math.log1p(-beta))
    return beta * _kl(teacher_TV, mixed_TV) + (1 - beta) * _kl(student_TV, mixed_TV)


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


def _kl(p_TV: torch.Tensor, q_TV: torch.Tensor) -> torch.Tensor:
    p_TV, q_TV = p_TV.clamp_min(LOWEST), q_TV.clamp_min(LOWEST)
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1)
