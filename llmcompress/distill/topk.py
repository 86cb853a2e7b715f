"""A distribution kept as its K likeliest tokens and the exact mass of all others.

    [ p1  p2  ...  pK | rest ]        rest = 1 - (p1 + ... + pK), computed from the whole distribution

The student is folded the same way (its own probability of the same K tokens, and its own rest), and any divergence of
the two folded distributions is taken over K + 1 outcomes. Folding never adds to a divergence (data processing), and for
the forward KL the chain rule says what it takes away:

    online - cached = rest * KL(teacher's tail || student's tail)        between 0 and rest * log(1 / least of the
                                                                         student's tail probabilities)

The gradient with respect to the student's logits moves by at most 2 * rest / temperature in L1 norm (times
temperature^2, as all of the loss is), whatever the student is: `rest` is what the report states.

Shapes: T tokens, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import torch

from llmcompress.distill.losses import LOWEST


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
