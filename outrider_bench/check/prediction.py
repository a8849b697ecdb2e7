"""Predicted speed-up of a pair from measured costs and acceptance. Pure arithmetic.

Ahead, as served: the cost model that chooses γ (`orchestrator/speculation/round_values.py`). In
turn: draft and target wait for each other (Leviathan et al. 2023, Theorem 3.8, with overheads).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from orchestrator.speculation.round_costs import DraftCosts, PairCosts, TargetCosts
from orchestrator.speculation.round_values import RoundValues
from outrider.replica import CostReport


@dataclass(frozen=True)
class PairCost:
    """Costs of passes as the services report them, and what a round takes beyond them.

    `overhead_s`: network, orchestrator and queue of a round without drafts. `draft_overhead_s`: the
    same from a commit to its proposal.
    """

    target: CostReport
    draft: CostReport
    overhead_s: float
    draft_overhead_s: float

    def ratio(self, num_rows: int) -> float:
        """Draft step over target pass for one token of each of `num_rows` sequences."""
        target_s = self.target.pass_s(num_rows, num_rows)
        return self.draft.pass_s(num_rows, num_rows) / target_s if target_s else math.inf


@dataclass(frozen=True)
class Situation:
    """Where the pair would work. `rtt_s`: network to the draft and back, in addition to this."""

    num_streams: int
    rtt_s: float = 0.0
    num_drafts: int = 1


@dataclass(frozen=True)
class Prediction:
    """Speed-ups over γ = 0. `in_turn` and `ahead` [γ]; entry 0 is 1.

    `plain_tokens_per_s`: of all streams with γ = 0. `draft_shares` [γ]: share of a round in which
    a draft replica works for this target.
    """

    situation: Situation
    in_turn: tuple[float, ...]
    ahead: tuple[float, ...]
    plain_tokens_per_s: float = 0.0
    draft_shares: tuple[float, ...] = ()

    @property
    def best_gamma(self) -> int:
        """γ of the highest speed-up ahead; of equal ones the smallest."""
        return max(range(len(self.ahead)), key=lambda gamma: (self.ahead[gamma], -gamma))

    @property
    def speed_up(self) -> float:
        """Speed-up ahead at the best γ; at least 1, since γ = 0 is always possible."""
        return self.ahead[self.best_gamma]

    @property
    def draft_share(self) -> float:
        """Share of a round in which a draft replica works, at the best γ."""
        return self.draft_shares[self.best_gamma]


def predicted(
    cost: PairCost, tokens: Sequence[float], situation: Situation, hit_rate: float
) -> Prediction:
    """`tokens` [γ]: tokens per round, `tokens[0]` is 1. `hit_rate`: see `hit_rate_at`."""
    num = situation.num_streams
    num_rows = max(1.0, num / situation.num_drafts)
    target = TargetCosts(
        lambda: replace(cost.target, mean_num_rows=float(num)), cost.overhead_s, cost.overhead_s
    )
    draft = DraftCosts(
        lambda: replace(cost.draft, mean_num_rows=num_rows),
        cost.draft_overhead_s + situation.rtt_s,
    )
    max_gamma = len(tokens) - 1
    steps_s = target.steps_s(max_gamma)
    # The model sums survival by position to tokens per round; these sums were measured.
    gains = tuple(after - before for before, after in pairwise(tokens))
    miss_rate = 1 - hit_rate_at(hit_rate, cost, situation)
    values = RoundValues.of(PairCosts(target, draft), steps_s, gains, miss_rate)
    plain = values.tokens_per_s[0]
    in_turn_s = (steps_s[g] + cost.overhead_s + values.draft_wait_s[g] for g in range(len(tokens)))
    return Prediction(
        situation,
        in_turn=tuple(t / s / plain for t, s in zip(tokens, in_turn_s, strict=True)),
        ahead=tuple(rate / plain for rate in values.tokens_per_s),
        plain_tokens_per_s=num * plain,
        # γ tokens and the guess of the token after them.
        draft_shares=tuple(
            (g + 1) * draft.step_s / round_s if g else 0.0
            for g, round_s in enumerate(values.round_s)
        ),
    )


def hit_rate_at(hit_rate: float, cost: PairCost, situation: Situation) -> float:
    """Probability that a proposal is ready, with a network: every round on the way must be guessed.

    `hit_rate`: probability that the draft has guessed the outcome of one round.
    """
    round_s = cost.target.pass_s(situation.num_streams, situation.num_streams) + cost.overhead_s
    depth = max(1.0, situation.rtt_s / round_s) if round_s else 1.0
    return float(hit_rate**depth)
