"""Predicted speed-up of a pair from measured costs and acceptance. Pure arithmetic.

In turn, draft and target wait for each other (Leviathan et al. 2023, Theorem 3.8, with overheads).
Ahead, as served, extends the cost model that chooses γ (`orchestrator/speculation/round_values.py`)
by what that model measures while it serves and a prediction cannot:

    hit(γ)   = P(outcome foreseen) · min(1, time for drafting / (2 (γ + 1) steps)) · (N / R)^-0.3
    batch    = N / (1 + q),  q = 0.75 (1 - 1 / N)
    round(γ) = max((1 + q) passes of batch · (γ + 1) tokens + overhead, γ + 1 draft steps)
    rate(γ)  = the better of waiting for the draft after a miss, and a round without draft tokens

with N streams and R draft replicas. `hit`: a proposal is ready if its outcome was among those that
the draft has time for: its next block, and one for each way in which the target may depart from it.
`q`: streams that wait for drafts form alternating batches. The four constants were fitted to the
twenty points of docs/benchmarks/scaling.json (one to sixteen streams, c of 0.05 and 0.2, with and
without a network), of which the worst is off by 14 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from orchestrator.speculation.round_costs import TargetCosts
from orchestrator.speculation.round_values import verify_round_s
from outrider.replica import CostReport
from outrider.sampling.formulas import mean_acceptance_length

# See the module's docstring.
_BLOCKS_PER_ROUND = 2.0
_CROWDING = 0.3
_QUEUED_PASSES = 0.75
# Share of a round trip in which the draft cannot know what it will be asked for.
_NETWORK_SHARE = 0.5


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
class RoundShapes:
    """Rounds by γ; entry 0 is plain decoding. `tokens` [γ]: mean number of tokens.

    `all_accepted` [γ]: P(no draft token is rejected). `foreseen_rejection`, `foreseen_bonus`:
    P(the emitted token is among the draft's candidates) after a rejection, and after none.
    """

    tokens: tuple[float, ...]
    all_accepted: tuple[float, ...]
    foreseen_rejection: float
    foreseen_bonus: float

    @classmethod
    def of_alpha(cls, alpha: float, max_gamma: int, foreseen_rejection: float) -> RoundShapes:
        """With the same acceptance rate α at every position."""
        gammas = range(max_gamma + 1)
        return cls(
            tuple(mean_acceptance_length(alpha, gamma) for gamma in gammas),
            tuple(alpha**gamma for gamma in gammas),
            foreseen_rejection,
            alpha + (1 - alpha) * foreseen_rejection,
        )

    def foreseen(self, gamma: int) -> float:
        """P(the draft's candidates contain what a round with γ draft tokens ends with)."""
        full = self.all_accepted[gamma]
        return full * self.foreseen_bonus + (1 - full) * self.foreseen_rejection


@dataclass(frozen=True)
class Prediction:
    """Speed-ups over γ = 0. `in_turn` and `ahead` [γ]; entry 0 is 1.

    `plain_tokens_per_s`: of all streams with γ = 0. `draft_shares` [γ]: share of a round in which
    a draft replica works for this target. `hit_rates` [γ]: P(a proposal is ready).
    """

    situation: Situation
    in_turn: tuple[float, ...]
    ahead: tuple[float, ...]
    plain_tokens_per_s: float = 0.0
    draft_shares: tuple[float, ...] = ()
    hit_rates: tuple[float, ...] = ()

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


def target_costs(cost: PairCost, num_rows: float, num_queued_passes: float = 0.0) -> TargetCosts:
    """The target's costs with batches of `num_rows` sequences, as the orchestrator keeps them."""
    report = replace(cost.target, mean_num_rows=num_rows)
    step_s = report.pass_s(num_rows, num_rows)
    queue_s = num_queued_passes * step_s
    return TargetCosts(lambda: report, cost.overhead_s + queue_s, cost.overhead_s, step_s)


def predicted(cost: PairCost, shapes: RoundShapes, situation: Situation) -> Prediction:
    """Speed-ups for γ = 0 to the last of `shapes`."""
    num, tokens = situation.num_streams, shapes.tokens
    max_gamma = len(tokens) - 1
    draft_s = _draft_step_s(cost, situation)
    alone = target_costs(cost, num)
    plain_s = verify_round_s(alone, alone.steps_s(max_gamma))[0]
    wait_s = [cost.draft_overhead_s + situation.rtt_s + g * draft_s for g in range(max_gamma + 1)]
    in_turn_s = [step_s + cost.overhead_s for step_s in alone.steps_s(max_gamma)]
    rounds = [
        _ahead(cost, shapes, situation, gamma, wait_s[gamma]) for gamma in range(1, max_gamma + 1)
    ]
    return Prediction(
        situation,
        in_turn=(
            1.0,
            *(tokens[g] * plain_s / (in_turn_s[g] + wait_s[g]) for g in range(1, max_gamma + 1)),
        ),
        ahead=(1.0, *(one.tokens_per_s * plain_s for one in rounds)),
        plain_tokens_per_s=num / plain_s,
        draft_shares=(
            0.0,
            *((g + 1) * draft_s / one.round_s for g, one in enumerate(rounds, 1)),
        ),
        hit_rates=(0.0, *(one.hit_rate for one in rounds)),
    )


@dataclass(frozen=True)
class _Ahead:
    """A round of one stream with work ahead."""

    tokens_per_s: float
    round_s: float
    hit_rate: float


def _draft_step_s(cost: PairCost, situation: Situation) -> float:
    num_rows = max(1.0, situation.num_streams / situation.num_drafts)
    return cost.draft.pass_s(num_rows, num_rows)


def _ahead(
    cost: PairCost, shapes: RoundShapes, situation: Situation, gamma: int, wait_s: float
) -> _Ahead:
    num, tokens = situation.num_streams, shapes.tokens[gamma]
    num_queued = _QUEUED_PASSES * (1 - 1 / num)
    target = target_costs(cost, num / (1 + num_queued), num_queued)
    verify_s = verify_round_s(target, target.steps_s(gamma))[gamma]
    drafting_s = (gamma + 1) * _draft_step_s(cost, situation)
    round_s = max(verify_s, drafting_s)
    hit_rate = shapes.foreseen(gamma) * (num / situation.num_drafts) ** -_CROWDING
    if drafting_s:
        time_s = max(0.0, round_s - _NETWORK_SHARE * situation.rtt_s)
        hit_rate *= min(1.0, time_s / (_BLOCKS_PER_ROUND * drafting_s))
    # A request that would queue anyway waits for nothing.
    added_s = max(0.0, wait_s - target.queue_s)
    waiting = tokens / (round_s + (1 - hit_rate) * added_s)
    without = (hit_rate * tokens + 1 - hit_rate) / round_s
    return _Ahead(max(waiting, without), round_s, hit_rate)
