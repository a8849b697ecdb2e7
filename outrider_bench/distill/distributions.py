"""Distributions of the target at some positions, in part: the most likely tokens, and a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TOP = 48
NUM_SAMPLED = 16
# Least probability of all tokens that are not among the most likely ones: a guard for logarithms.
_MIN_REST = 1e-6
# Logarithm of a probability that counts as 0.
_NOTHING = -30.0


@dataclass(frozen=True)
class PartialDistributions:
    """The target's distributions at some positions, in part.

    `token_ids` int32, `log_probs` float16 [positions, columns]. The first `num_top` columns are the
    most likely tokens. The others are drawn with replacement from the rest of the distribution; if
    there are none, the rest counts as one token. `vocab_size`: of the models that are compared;
    None: that of the draft's logits.
    """

    token_ids: Tensor
    log_probs: Tensor
    num_top: int
    vocab_size: int | None = None

    @classmethod
    def recorded(
        cls, top_ids: Sequence[Sequence[int]], top_log_probs: Sequence[Sequence[float]]
    ) -> PartialDistributions:
        """The most likely tokens alone [positions][k]. Raises ValueError for a missing position."""
        log_probs = torch.tensor(top_log_probs).clamp_min(_NOTHING).half()
        return cls(torch.tensor(top_ids, dtype=torch.int32), log_probs, log_probs.shape[-1])

    @classmethod
    def joined(cls, parts: Sequence[PartialDistributions]) -> PartialDistributions:
        """Positions of all parts, with the columns that all have."""
        width = min(part.token_ids.shape[-1] for part in parts)
        return cls(
            torch.cat([part.token_ids[:, :width] for part in parts]),
            torch.cat([part.log_probs[:, :width] for part in parts]),
            min(width, *(part.num_top for part in parts)),
        )

    def split(self, lengths: Sequence[int]) -> list[PartialDistributions]:
        """Parts of the given lengths in positions, on the CPU, each with memory of its own."""
        parts = (torch.split(values.cpu(), list(lengths))
                 for values in (self.token_ids, self.log_probs))  # fmt: skip
        return [
            PartialDistributions(token_ids.clone(), log_probs.clone(), self.num_top)
            for token_ids, log_probs in zip(*parts, strict=True)
        ]

    def within(self, vocab_size: int, device: torch.device) -> PartialDistributions:
        """The same for models that have these ids in common, on a device."""
        token_ids, log_probs = self.token_ids.to(device), self.log_probs.to(device)
        is_missing = token_ids >= vocab_size
        return PartialDistributions(
            token_ids.masked_fill(is_missing, 0),
            log_probs.masked_fill(is_missing, _NOTHING),
            self.num_top,
            vocab_size,
        )

    @property
    def num_bytes(self) -> int:
        """Memory of it."""
        return self.token_ids.nbytes + self.log_probs.nbytes

    def compared(self, draft_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities float32 [positions, columns] of target and draft, for a loss.

        A drawn token stands for `weight` tokens: it was drawn with its share of the rest, so that
        the weighted sum of any f(p, q) estimates that over the whole rest without bias. The weight
        is in both values, because the terms of all losses are in proportion to (p, q).
        """
        target = self.log_probs.float()
        logits = draft_logits[:, : self.vocab_size].float()
        draft = logits.gather(-1, self.token_ids.long()) - logits.logsumexp(-1, keepdim=True)
        num_drawn = target.shape[-1] - self.num_top
        rest = _rest(target[:, : self.num_top])
        if not num_drawn:
            columns = ((target, rest), (draft, _rest(draft)))
            return torch.cat(columns[0], -1), torch.cat(columns[1], -1)
        log_weights = rest - math.log(num_drawn) - target[:, self.num_top :]
        weights = torch.cat((torch.zeros_like(target[:, : self.num_top]), log_weights), -1)
        return target + weights, draft + weights


def _rest(log_probs: Tensor) -> Tensor:
    """Logarithm of the probability of all other tokens [positions, 1]."""
    return (1.0 - log_probs.exp().sum(-1, keepdim=True)).clamp_min(_MIN_REST).log()


def partial_distributions(
    logits: Tensor, generator: torch.Generator, num_top: int = NUM_TOP
) -> PartialDistributions:
    """The most likely tokens of logits [positions, vocab], and a sample of the others."""
    log_probs = logits.float().log_softmax(-1)
    num_top = min(num_top, log_probs.shape[-1])
    top, top_ids = log_probs.topk(num_top, -1)
    others = log_probs.exp().scatter_(-1, top_ids, 0.0)
    if num_top < others.shape[-1]:
        # Where rounding leaves nothing, any token does: its weight is that of the rest.
        drawn_ids = (others + torch.finfo(torch.float32).tiny).multinomial(
            NUM_SAMPLED, replacement=True, generator=generator
        )
        top_ids = torch.cat((top_ids, drawn_ids), -1)
        top = torch.cat((top, log_probs.gather(-1, drawn_ids)), -1)
    return PartialDistributions(top_ids.int(), top.clamp_min(_NOTHING).half(), num_top)
