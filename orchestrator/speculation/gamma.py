"""γ policy: chooses the number of draft tokens of a round and the longest wait for them.

The γ of the most tokens per second is chosen (`round_values`), for a few rounds at a time. Waiting
for a late proposal is worth it while its tokens outweigh, at that rate, the time it takes. γ = 0 is
plain decoding; probes (`probing`) then try draft tokens now and then. The policy has no clock: its
observe methods are called with what happened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.speculation.acceptance import AcceptanceModel
from orchestrator.speculation.probing import ProbeSchedule
from orchestrator.speculation.round_costs import (
    PROBE_SMOOTHING,
    SMOOTHING,
    DraftStatistics,
    PairCosts,
)
from orchestrator.speculation.round_values import RoundValues

# Another γ must be this much better. Covers costs that vary by 2 % between reports.
HYSTERESIS = 1.03
# The same for leaving γ = 0: the costs of rounds are estimated no better than to about 10 %.
PLAIN_HYSTERESIS = 1.1
# Choice: costs and acceptance change little in four rounds.
ROUNDS_PER_DECISION = 4

# Draft tokens of a probe. Choice: few, for most probes fail.
_PROBE_GAMMA = 2
# A probe waits for the draft's own steps and this many rounds, whatever the estimates are: its
# result must not depend on them.
_PROBE_WAIT_ROUNDS = 2.0
# Longest probe in rounds: the draft may have to open the session, or to process many tokens.
_PROBE_ROUNDS = 16

# Before costs are reported. Choice: a γ that suits most pairs, and half a second.
_FIRST_GAMMA = 5
_FIRST_WAIT_S = 0.5

# Below this rate of look-ahead hits, only waiting shows whether proposals come. Choice.
_MIN_HIT_RATE = 0.1
# Factor on the draft's overhead at each decision not to wait. Choice: 70 decisions halve it.
_OVERHEAD_DECAY = 0.99
# Longest wait in units of the expected one. Choice: for variation, not for a draft that hangs.
_MAX_WAIT_FACTOR = 3.0
# Shortest wait in rounds, so that a draft that has recovered is noticed. Choice.
_MIN_WAIT_ROUNDS = 0.1
# A request's own γ is waited for if that is expected to take at most this many rounds. Choice.
_MAX_FIXED_WAIT_ROUNDS = 4.0
# Longest wait of a request that always waits, unless the operator sets another.
_ALWAYS_WAIT_S = 10.0


@dataclass(frozen=True)
class GammaDecision:
    """A choice and its inputs; mirrors orchestrator.proto's GammaDecision.

    `gamma`: for a proposal that is ready; `waiting_gamma`: for one that is waited for, at most
    `wait_s` seconds.
    """

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
    """γ policy of one generation.

    `fixed`: the request's own γ. `fixed_wait_s`: the operator's longest wait. `waits_always`: every
    round waits for all its draft tokens. `num_measured_rounds`: number of rounds that have draft
    tokens even if plain decoding is faster, to measure the draft's acceptance.
    """

    def __init__(
        self,
        costs: PairCosts,
        max_gamma: int,
        *,
        fixed: int | None = None,
        fixed_wait_s: float | None = None,
        waits_always: bool = False,
        num_measured_rounds: int = 0,
    ) -> None:
        self.costs = costs
        self._num_measured_rounds_left = num_measured_rounds
        self.waits_always = waits_always
        if waits_always and fixed_wait_s is None:
            fixed_wait_s = _ALWAYS_WAIT_S
        self._max_gamma = max_gamma
        self._fixed = fixed
        self._fixed_wait_s = fixed_wait_s
        model = costs.model
        self._acceptance = AcceptanceModel(model.acceptance)
        self._hit_rate = costs.shared.lookahead_hit_rate
        self._decision: GammaDecision | None = None
        # What the decision was made from; None while the target reports no costs.
        self.values: RoundValues | None = None
        self._num_rounds_left = 0  # of the decision
        # The γ chosen last; probes are not choices. None: draft tokens have paid so far, or nothing
        # is known.
        self._choice: int | None = 0 if model.probes.num_plain_rounds else None
        # Its own schedule besides the shared one: its acceptance may be better than that of others.
        self._probes = ProbeSchedule(model.probes.interval)
        self._num_probe_rounds_left = 0
        # All draft tokens of the last round were accepted.
        self._is_promising = False

    @property
    def decision(self) -> GammaDecision:
        """The current decision; a new one every few rounds."""
        if self._decision is None or self._num_rounds_left <= 0:
            self._num_rounds_left = ROUNDS_PER_DECISION
            self._decision = self._decide()
        return self._decision

    def use_model(self, model: DraftStatistics) -> None:
        """The draft tokens now come from another draft model, if it is another one."""
        if model is not self.costs.model:
            self.costs.model = model
            self._acceptance = AcceptanceModel(model.acceptance)
            self._probes = ProbeSchedule(model.probes.interval)
            self._num_rounds_left = 0

    def lookahead(self, max_rounds: int) -> int:
        """Rounds that the draft should work ahead, so that its proposals are ready in time.

        That is the time a proposal takes, in rounds. Deeper proposals are better drafted later,
        when more tokens are known.
        """
        decision = self.decision
        if not decision.target_step_s or max_rounds == 0:
            return min(1, max_rounds)
        proposal_s = decision.draft_overhead_s + (decision.gamma + 1) * decision.draft_step_s
        round_s = decision.target_step_s[0] + decision.target_overhead_s
        return max(1, min(max_rounds, math.ceil(proposal_s / round_s)))

    def observe_round(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        """A round was verified. `is_rejected`: one of its draft tokens was rejected."""
        self._num_rounds_left -= 1
        self._num_probe_rounds_left -= 1
        self._num_measured_rounds_left -= 1
        self._is_promising = num_draft_tokens > 0 and not is_rejected
        if num_draft_tokens:
            self._num_probe_rounds_left = 0
            if self._decision is not None and self._decision.gamma > _PROBE_GAMMA:
                self._probes.reset()
                self.costs.model.probes.reset()
            self._acceptance.observe(num_draft_tokens, num_accepted, is_rejected=is_rejected)

    def observe_other_round(self) -> None:
        """A round had draft tokens of another source."""
        self._num_rounds_left -= 1

    def observe_lookahead(self, *, is_hit: bool) -> None:
        """Whether a round's proposal had arrived before the verify result that it follows."""
        is_probe = is_hit and self._num_probe_rounds_left > 0
        smoothing = PROBE_SMOOTHING if is_probe else SMOOTHING
        self._hit_rate += smoothing * (is_hit - self._hit_rate)
        if is_probe:  # the draft is in time now, whatever was measured before
            self.costs.draft.reduce_overhead(1 - PROBE_SMOOTHING)
        self.costs.shared.observe_lookahead(is_hit=is_hit)

    def observe_proposal(self, waited_s: float, num_tokens: int) -> None:
        """A proposal that was waited for came."""
        is_probe = self._num_probe_rounds_left > 0
        self.costs.observe_proposal(waited_s, num_tokens, is_probe=is_probe)

    def observe_missing_proposal(self, waited_s: float) -> None:
        """A proposal that was waited for did not come."""
        self.costs.observe_missing_proposal(waited_s, self.decision.waiting_gamma)
        self._num_rounds_left = self._num_probe_rounds_left = 0

    def _decide(self) -> GammaDecision:
        costs, is_fixed = self.costs, self._fixed is not None
        steps_s = costs.target.steps_s(self._max_gamma)
        survival = tuple(self._acceptance.survival(self._max_gamma))
        if steps_s[0] <= 0:  # not reported yet
            gamma = min(_FIRST_GAMMA, self._max_gamma) if self._fixed is None else self._fixed
            wait_s = _FIRST_WAIT_S if self._fixed_wait_s is None else self._fixed_wait_s
            return GammaDecision(gamma, gamma, wait_s, is_fixed, survival)
        values = self.values = RoundValues.of(costs, steps_s, survival, 1 - self._hit_rate)
        gamma = self._choice = self._best_gamma(values.tokens_per_s)
        is_probe = gamma == 0 and not is_fixed and self._is_probing(values)
        if is_probe:
            gamma, self._num_rounds_left = min(_PROBE_GAMMA, self._max_gamma), 1
        waiting_gamma, is_trial = gamma, is_probe
        if not (is_fixed or is_probe or self.waits_always):
            waiting_gamma, is_trial = self._waiting_gamma(values, gamma)
        return GammaDecision(
            gamma=gamma,
            waiting_gamma=waiting_gamma,
            wait_s=self._wait_s(values, waiting_gamma, is_trial),
            is_fixed=is_fixed,
            survival=survival,
            target_step_s=steps_s,
            mean_num_rows=costs.target.report().mean_num_rows,
            draft_step_s=costs.draft.step_s,
            draft_overhead_s=costs.draft.overhead_s,
            target_overhead_s=costs.target.overhead_s,
            lookahead_hit_rate=self._hit_rate,
            tokens_per_s=values.tokens_per_s,
            waiting_tokens_per_s=values.waiting_tokens_per_s,
        )

    def _best_gamma(self, rates: Sequence[float]) -> int:
        """The γ of the highest rate, with hysteresis; of equal ones the smallest."""
        if self._fixed is not None:
            return self._fixed
        best, last = max(range(len(rates)), key=lambda gamma: (rates[gamma], -gamma)), self._choice
        if last is None:
            return best
        hysteresis = HYSTERESIS if last else PLAIN_HYSTERESIS
        if rates[best] >= hysteresis * rates[last]:
            return best
        return last if rates[last] >= rates[0] else 0

    def _waiting_gamma(self, values: RoundValues, gamma: int) -> tuple[int, bool]:
        """The draft tokens worth a wait, and whether that wait is a trial, as in a probe."""
        waiting_gamma = max(range(gamma + 1), key=lambda g: (values.waiting_gain(g), -g))
        if waiting_gamma or not gamma:
            return waiting_gamma, False
        self.costs.draft.reduce_overhead(_OVERHEAD_DECAY)
        # Without hits and without waits, the draft tokens accepted last would be the last ever.
        is_trial = self._is_promising and self._hit_rate < _MIN_HIT_RATE
        return (gamma, True) if is_trial else (0, False)

    def _is_probing(self, values: RoundValues) -> bool:
        """Called at a decision for γ = 0: whether a probe goes on or starts."""
        if self._num_measured_rounds_left > 0:
            return True
        return values.may_pay and (self._num_probe_rounds_left > 0 or self._starts_probe())

    def _starts_probe(self) -> bool:
        """Starts a probe if one is due, or if all draft tokens of the last one were accepted."""
        schedules = (self._probes, self.costs.model.probes)
        is_due = [schedule.advance(ROUNDS_PER_DECISION) for schedule in schedules]
        if not any(is_due) and not self._is_promising:
            return False
        for schedule in schedules:
            schedule.probed(is_promising=self._is_promising)
        self._num_rounds_left, self._num_probe_rounds_left = 1, _PROBE_ROUNDS
        return True

    def _wait_s(self, values: RoundValues, gamma: int, is_trial: bool) -> float:
        """The longest wait for γ draft tokens."""
        if self._fixed_wait_s is not None:
            return self._fixed_wait_s
        expected_s, round_s = values.draft_wait_s[gamma], values.round_s[0]
        wait_s = values.break_even_wait_s(gamma)
        if self._fixed:  # the request's γ, even if it does not pay
            is_late = expected_s > _MAX_FIXED_WAIT_ROUNDS * round_s
            wait_s = 0.0 if is_late else _MAX_WAIT_FACTOR * expected_s
            is_trial = is_late and self._starts_probe()
        if is_trial:
            wait_s = gamma * self.costs.draft.step_s + _PROBE_WAIT_ROUNDS * round_s
        longest_s, shortest_s = _MAX_WAIT_FACTOR * expected_s + round_s, _MIN_WAIT_ROUNDS * round_s
        return max(min(wait_s, longest_s), shortest_s)
