"""Rounds of speculative decoding, replayed along texts that the target wrote. Pure arithmetic.

A text is a list of acceptance probabilities, one per token: that the token was an accepted draft
token, given that it was emitted at a position with a draft token. This replays the rounds exactly
in law. At a temperature, a draft token x is accepted with probability min(p, q)(x) in total, and x
is emitted with p(x), so the probability is min(1, q(x) / p(x)), whatever comes later. It assumes
nothing about how acceptance depends on position or content, as the formula with one α does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Text = Sequence[float]


@dataclass(frozen=True)
class Rounds:
    """Expected rounds with γ draft tokens each.

    `tokens_per_round` is τ. `alpha`: accepted draft tokens over accepted and rejected ones.
    `survival` [γ]: probability that at least k + 1 draft tokens of a round are accepted, among the
    rounds with at least k + 1 draft tokens. `num_rounds`: how many this is based on.
    """

    tokens_per_round: float
    alpha: float
    survival: tuple[float, ...]
    num_rounds: float


def replayed(texts: Sequence[Text], gamma: int) -> Rounds:
    """Rounds with γ draft tokens along the texts. Raises ValueError if no text has two tokens.

    The first token of a text comes from the prompt's pass, without draft tokens. The last round has
    at most as many draft tokens as the text takes, as when the services stop there.
    """
    num_rounds = num_tokens = num_verified = num_accepted = 0.0
    had, survived = [0.0] * gamma, [0.0] * gamma
    for text in texts:
        num_tokens += max(0, len(text) - 1)
        # Probability that a round starts at this position.
        starts = [0.0] * (len(text) + 1)
        if len(text) > 1:
            starts[1] = 1.0
        for position in range(1, len(text)):
            start = starts[position]
            if start <= 0:
                continue
            num_rounds += start
            num_draft = min(gamma, len(text) - position - 1)
            alive = start
            for k in range(num_draft):
                prob = text[position + k]
                had[k] += start
                num_verified += alive
                starts[position + k + 1] += alive * (1 - prob)
                alive *= prob
                num_accepted += alive
                survived[k] += alive
            starts[position + num_draft + 1] += alive
    if not num_rounds:
        raise ValueError("no text has two tokens")
    return Rounds(
        tokens_per_round=num_tokens / num_rounds,
        alpha=num_accepted / num_verified if num_verified else 0.0,
        survival=tuple(s / h for s, h in zip(survived, had, strict=True) if h),
        num_rounds=num_rounds,
    )
