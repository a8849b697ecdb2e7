"""Losses of distillation: how far a draft's next-token distribution is from its target's.

Each loss takes log-probabilities float [..., vocab] and returns one value per position, float
[...]: `target_log_probs`, then `draft_log_probs`. All are 0 for equal distributions and at least 0
otherwise. Pure; gradients are meant for the draft.

Below, p is the target's distribution, q the draft's, α = Σ min(p, q) the acceptance rate of
rejection sampling (Leviathan et al. 2023, Corollary 3.6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

# η of `lk_lambda`: the default of vLLM's speculators, which names it the paper's best.
_LK_ETA = 3.0


def acceptance(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """α = Σ min(p, q) per position: the probability that rejection sampling accepts a token."""
    return torch.minimum(target_log_probs, draft_log_probs).exp().sum(-1)


def forward_kl(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """KL(p || q) = Σ p log(p / q), in nats. The draft covers everything that the target may say.

    DistillSpec (Zhou et al. 2023, arXiv 2310.08461) compares it with the next two losses.
    """
    pointwise = F.kl_div(draft_log_probs, target_log_probs, reduction="none", log_target=True)
    return pointwise.sum(-1)


def reverse_kl(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """KL(q || p) = Σ q log(q / p), in nats. The draft concentrates on what is likely."""
    return forward_kl(draft_log_probs, target_log_probs)


def total_variation(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """TV(p, q) = ½ Σ |p - q| = 1 - α. Its gradient vanishes where p and q hardly overlap."""
    return 1.0 - acceptance(target_log_probs, draft_log_probs)


def lk_alpha(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """-log α: the gradient of TV, divided by α, which is large where the overlap is small.

    LK losses, Samarin et al. 2026, arXiv 2602.23881; `nla` in vLLM's speculators.
    """
    return -torch.minimum(target_log_probs, draft_log_probs).logsumexp(-1)


def lk_lambda(target_log_probs: Tensor, draft_log_probs: Tensor) -> Tensor:
    """λ KL(p || q) + (1 - λ) TV(p, q), with λ = exp(-3 α) per position and no gradient through λ.

    LK losses, Samarin et al. 2026, arXiv 2602.23881, in the form of `lk_hybrid` of vLLM's
    speculators.
    """
    alpha = acceptance(target_log_probs, draft_log_probs)
    weight = torch.exp(-_LK_ETA * alpha.detach())
    return weight * forward_kl(target_log_probs, draft_log_probs) + (1.0 - weight) * (1.0 - alpha)


# By name of `--loss`.
LOSSES: Mapping[str, Loss] = {
    "kl": forward_kl,
    "reverse-kl": reverse_kl,
    "tv": total_variation,
    "lk-alpha": lk_alpha,
    "lk-lambda": lk_lambda,
}
