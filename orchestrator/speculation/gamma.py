"""How many draft tokens a round is worth: γ by value, and how long to wait for them.

A round with γ draft tokens emits 1 + Σ S_k tokens (S_k: chance that k are accepted) in the time of
a target pass over all rows' γ + 1 tokens, the round trip, and whatever the draft is waited for. The
γ of the highest rate is chosen; a wait is worth it while the tokens it brings outweigh, at that
rate, the time it takes (the renewal-reward argument). γ = 0 where speculation does not pay: plain
decoding, tried again now and then. Pure: told what happened, knows no clock, link or wire; what
rounds cost and bring is in `rates`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.speculation.acceptance import AcceptanceModel
from orchestrator.speculation.round_costs import (
    PROBE_SMOOTHING,
    SMOOTHING,
    PairCosts,
    Probing,
    RoundValues,
)

# A γ is left only for one this much better, so that noise does not make it flutter.
_HYSTERESIS = 1.03
# Plain decoding only for one that promises so much: what rounds cost is not known better.
_LEAST_GAIN = 1.1
# A decision stands for so many rounds.
_ROUNDS_PER_DECISION = 4
_PROBE_GAMMA = 2
# What it finds out must not depend on what is thought: it waits for the draft's own steps and this
# many rounds, whatever that is worth.
_PROBE_WAIT_ROUNDS = 2.0
# It stands until something is known: the draft may have the session to open, or much to catch up.
_PROBE_PATIENCE_ROUNDS = 16
# What is not measured yet: this γ, and a wait of so much of a round.
_FIRST_GAMMA = 5
_FIRST_WAIT_S = 0.5
# Below this share of look-ahead hits, drafts are known from waits alone.
_FEW_HITS = 0.1
# Longest wait of a generation that always waits, where the operator sets no other.
_ALWAYS_WAIT_S = 10.0
# A request's own γ is waited for up to so many rounds.
_FIXED_PATIENCE_ROUNDS = 4.0
# A wait may take this many times what is expected, if it is worth it.
_LATE_RATIO = 3.0


@dataclass(frozen=True)
class GammaDecision:
    """The choice and its inputs; as orchestrator.proto's GammaDecision. `wait_s`: at most."""

    gamma: int
    waiting_gamma: int
    wait_s: float
    is_fixed: bool
    survival: tuple[float, ...] = ()
    target_step_s: tuple[float, ...] = ()
    mean_num_rows: float = 1.0
    draft_step_s: float = 0.0
    draft_overhead_s: float = 0.0
    target_overhead_s: float = 0.0
    lookahead_hit_rate: float = 0.0
    tokens_per_s: tuple[float, ...] = ()
    waiting_tokens_per_s: tuple[float, ...] = ()


class GammaPolicy:
    """Of one generation. `fixed`: the request's own γ; `fixed_wait_s`: the operator's longest wait.

    `waits_always`: every round waits for its draft tokens, worth it or not.
    """

    def __init__(
        self,
        costs: PairCosts,
        max_gamma: int,
        *,
        fixed: int | None = None,
        fixed_wait_s: float | None = None,
        waits_always: bool = False,
    ) -> None:
        self.costs = costs
        self.waits_always = waits_always
        if waits_always and fixed_wait_s is None:
            fixed_wait_s = _ALWAYS_WAIT_S
        self._max_gamma = max_gamma
        self._fixed = fixed
        self._fixed_wait_s = fixed_wait_s
        self._survival = AcceptanceModel(costs.survival)
        self._hit_rate = costs.lookahead_hit_rate
        self._decision: GammaDecision | None = None
        # What was chosen last; a probe is no choice. None: nothing, here or by others, but drafts.
        self._choice: int | None = 0 if costs.probing.num_plain_rounds else None
        self._num_rounds_left = 0
        # Its drafts may be better than others': it tries by itself, too.
        self._probing = Probing(costs.probing.interval)
        self._num_probe_rounds_left = 0
        # The round before was a probe, and all its draft tokens stood.
        self._is_promising = False

    @property
    def decision(self) -> GammaDecision:
        """What stands; made anew every few rounds."""
        if self._decision is None or self._num_rounds_left <= 0:
            self._num_rounds_left = _ROUNDS_PER_DECISION
            self._decision = self._decide()
        return self._decision

    def lookahead(self, most: int) -> int:
        """How many rounds ahead the draft has to work for its proposals to be in time.

        What it drafts between hearing of one verdict and the next one needing its proposal; deeper
        work is better done later, when more is known.
        """
        decision = self.decision
        if not decision.target_step_s or most == 0:
            return min(1, most)
        ready_s = decision.draft_overhead_s + (decision.gamma + 1) * decision.draft_step_s
        round_s = decision.target_step_s[0] + decision.target_overhead_s
        return max(1, min(most, math.ceil(ready_s / round_s)))

    def observe_round(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        self._num_rounds_left -= 1
        self._num_probe_rounds_left -= 1
        self._is_promising = num_draft_tokens > 0 and not is_rejected
        if num_draft_tokens:
            self._num_probe_rounds_left = 0
            if self._decision is not None and self._decision.gamma > _PROBE_GAMMA:
                self._probing.paid()
                self.costs.probing.paid()
            self._survival.observe(num_draft_tokens, num_accepted, is_rejected=is_rejected)

    def observe_lookahead(self, *, is_hit: bool) -> None:
        """A round's proposal was here when the verdict before it came, or was not."""
        is_probe = is_hit and self._num_probe_rounds_left > 0
        smoothing = PROBE_SMOOTHING if is_probe else SMOOTHING
        self._hit_rate += smoothing * (is_hit - self._hit_rate)
        if is_probe:  # what was late once is not now
            self.costs.draft_overhead_s *= 1 - PROBE_SMOOTHING
        self.costs.observe_lookahead(is_hit=is_hit)

    def observe_proposal(self, waited_s: float, num_tokens: int) -> None:
        """It was waited for, and came."""
        is_probe = self._num_probe_rounds_left > 0
        self.costs.observe_proposal(waited_s, num_tokens, is_probe=is_probe)

    def observe_missing_proposal(self, waited_s: float) -> None:
        """It was waited for so long, in vain."""
        self.costs.observe_missing_proposal(waited_s, self.decision.waiting_gamma)
        self._num_rounds_left = self._num_probe_rounds_left = 0

    def _decide(self) -> GammaDecision:
        costs = self.costs
        steps_s = costs.target_steps_s(self._max_gamma)
        survival = tuple(self._survival.prefixes(self._max_gamma))
        if steps_s[0] <= 0:
            gamma = min(_FIRST_GAMMA, self._max_gamma) if self._fixed is None else self._fixed
            wait_s = _FIRST_WAIT_S if self._fixed_wait_s is None else self._fixed_wait_s
            return GammaDecision(gamma, gamma, wait_s, self._fixed is not None, survival)
        values = RoundValues.of(costs, steps_s, survival, 1 - self._hit_rate)
        gamma = self._choice = self._chosen(values.at_hand)
        is_probe = gamma == 0 and values.may_pay and self._fixed is None
        is_probe = is_probe and (self._num_probe_rounds_left > 0 or self._is_time_to_probe())
        if is_probe:
            gamma, self._num_rounds_left = min(_PROBE_GAMMA, self._max_gamma), 1
        waiting_gamma, is_trial = gamma, is_probe
        if self._fixed is None and not (is_probe or self.waits_always):
            waiting_gamma = max(range(gamma + 1), key=lambda g: (values.of_waiting(g), -g))
            if waiting_gamma == 0 and gamma:
                costs.forget_lateness()
                if self._is_promising and self._hit_rate < _FEW_HITS:
                    # Else nothing more would be learnt of what went well.
                    waiting_gamma, is_trial = gamma, True
        return GammaDecision(
            gamma=gamma,
            waiting_gamma=waiting_gamma,
            wait_s=self._wait_s(values, waiting_gamma, is_trial),
            is_fixed=self._fixed is not None,
            survival=survival,
            target_step_s=steps_s,
            mean_num_rows=costs.target().mean_num_rows,
            draft_step_s=costs.draft_step_s,
            draft_overhead_s=costs.draft_overhead_s,
            target_overhead_s=costs.target_overhead_s,
            lookahead_hit_rate=self._hit_rate,
            tokens_per_s=values.at_hand,
            waiting_tokens_per_s=values.waited,
        )

    def _chosen(self, rates: Sequence[float]) -> int:
        if self._fixed is not None:
            return self._fixed
        best, last = max(range(len(rates)), key=lambda gamma: (rates[gamma], -gamma)), self._choice
        if last is None or rates[best] >= (_HYSTERESIS if last else _LEAST_GAIN) * rates[last]:
            return best
        # What was chosen goes on while it is better than nothing.
        return last if rates[last] >= rates[0] else 0

    def _is_time_to_probe(self) -> bool:
        """Called at a decision for γ = 0.

        A probe that went well is followed by the next at once, till the choice is another one.
        """
        both = (self._probing, self.costs.probing)
        if not any([each.is_due(_ROUNDS_PER_DECISION) for each in both]) and not self._is_promising:
            return False
        for each in both:
            each.tried(is_promising=self._is_promising)
        self._num_rounds_left, self._num_probe_rounds_left = 1, _PROBE_PATIENCE_ROUNDS
        return True

    def _wait_s(self, values: RoundValues, gamma: int, is_trial: bool) -> float:
        """As long as it is worth; but not for ever for a draft that is always late."""
        if self._fixed_wait_s is not None:
            return self._fixed_wait_s
        expected_s, round_s = values.waits_s[gamma], values.rounds_s[0]
        worth_s = values.worth_s(gamma)
        if self._fixed:  # the request's γ holds, worth it or not, up to a point
            is_trial = expected_s > _FIXED_PATIENCE_ROUNDS * round_s and self._is_time_to_probe()
            worth_s = _LATE_RATIO * expected_s
            if expected_s > _FIXED_PATIENCE_ROUNDS * round_s:
                worth_s = 0.0
        if is_trial:
            worth_s = gamma * self.costs.draft_step_s + _PROBE_WAIT_ROUNDS * round_s
        # With nothing gained of late, a little patience is left: a draft may have recovered.
        return max(min(worth_s, _LATE_RATIO * expected_s + round_s), 0.1 * round_s)
