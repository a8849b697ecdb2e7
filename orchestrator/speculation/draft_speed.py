"""Expected speed with a draft, by its acceptance rate: how a slower draft is compared. Pure.

A draft that costs more must be accepted more often. The cost model is that which chooses γ
(`round_values`), for one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.speculation.round_costs import DraftCosts, PairCosts, TargetCosts
from orchestrator.speculation.round_values import RoundValues
from outrider.replica import CostReport

# Choice: as the largest γ that adaptive generations use by default.
MAX_GAMMA = 16
# Drafts whose costs differ by less than this factor count as equally fast. Choice: replicas of one
# model on different machines differ as much.
_SAME_COST = 1.25
# Most that a cost may count. Choice: a replica that has just started, or whose machine is busy,
# reports too high a cost, and must not decide alone.
MAX_HANDICAP = 0.3
_BISECTIONS = 30


@dataclass(frozen=True)
class DraftSpeed:
    """Measured costs of a pair. `miss_rate`: P(a proposal is not ready), of all generations.

    `draft_size`: what the draft's cost depends on, whatever its weights; empty: not known.
    """

    target: CostReport
    draft: CostReport
    miss_rate: float
    draft_size: str = ""

    def tokens_per_s(self, alpha: float) -> float:
        """Expected tokens per second of one stream at the best γ > 0. Rises with α."""
        return self.best_tokens_per_s([alpha**k for k in range(1, MAX_GAMMA + 1)])

    def best_tokens_per_s(self, survival: Sequence[float]) -> float:
        """The same; `survival` [k]: P(at least k + 1 draft tokens are accepted), of MAX_GAMMA."""
        target = TargetCosts(lambda: self.target)
        costs = PairCosts(target, DraftCosts(lambda: self.draft))
        steps_s = target.steps_s(MAX_GAMMA)
        return max(RoundValues.of(costs, steps_s, tuple(survival), self.miss_rate).tokens_per_s[1:])

    def alpha_for(self, tokens_per_s: float) -> float:
        """The acceptance rate in [0, 1] with this speed; the nearer end if there is none."""
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self.tokens_per_s(middle) < tokens_per_s:
                low = middle
            else:
                high = middle
        return (low + high) / 2


def handicap(new: DraftSpeed | None, old: DraftSpeed | None, old_alpha: float) -> float:
    """By how much the new draft's acceptance rate must be higher for the same speed.

    Negative if the new draft is faster; 0 if a cost is not known, or both are about the same, as
    drafts of one size are: a difference is their machines'. At most MAX_HANDICAP either way.
    """
    if new is None or old is None or new.draft_size == old.draft_size != "":
        return 0.0
    ratio = new.draft.pass_s(1, 1) / old.draft.pass_s(1, 1)
    if 1 / _SAME_COST < ratio < _SAME_COST:
        return 0.0
    needed = new.alpha_for(old.tokens_per_s(old_alpha)) - old_alpha
    return min(max(needed, -MAX_HANDICAP), MAX_HANDICAP)
