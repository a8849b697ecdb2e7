"""What rounds with γ draft tokens take and bring, with one pair of replicas as it is now. Pure.

Puts together what the tiers report of their passes and what is measured here of the way to them.
Knows nothing of choosing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from orchestrator.speculation.acceptance import AcceptanceModel
from outrider.replica import CostReport
from outrider.telemetry.distribution import Distribution

SMOOTHING = 0.1
# Of what a probe finds: there are few.
PROBE_SMOOTHING = 0.4
# Of the draft's lateness, at each decision not to wait for it.
_LATENESS_LEFT = 0.99
# Of the share of look-ahead hits over all generations: the last hundred or so rounds speak.
_HIT_SMOOTHING = 0.01
# While γ is 0 a round in so many tries drafts again, the fewer the longer they do not pay.
_FIRST_PROBE_ROUNDS = 32
_MAX_PROBE_ROUNDS = 512
# A prompt's pass costs more than the line says: attention grows with its square.
_PROMPT_SLACK = 2.0
# With fewer a row waits for no other.
_SEVERAL_ROWS = 1.5
# The least overhead seen is forgotten slowly.
_LEAST_RISES = 1.01


@dataclass
class Probing:
    """When it is time again for a round that tries drafts; nothing is learnt of one not asked."""

    interval: int = _FIRST_PROBE_ROUNDS
    num_plain_rounds: int = 0

    def is_due(self, num_rounds: int) -> bool:
        """So many more have been plain."""
        self.num_plain_rounds += num_rounds
        return self.num_plain_rounds >= self.interval

    def tried(self, *, is_promising: bool) -> None:
        self.num_plain_rounds = 0
        if not is_promising:
            self.interval = min(2 * self.interval, _MAX_PROBE_ROUNDS)

    def paid(self) -> None:
        """Drafts are chosen again."""
        self.num_plain_rounds, self.interval = 0, _FIRST_PROBE_ROUNDS


@dataclass
class TargetCosts:
    """What is known of one target replica; `report` gives what it has last said."""

    report: Callable[[], CostReport] = CostReport
    # Beyond its own passes, from a row to its reply.
    overhead_s: float = 0.001
    least_overhead_s: float = 0.001
    # Of the passes that those overheads were beyond.
    seen_step_s: float = 0.0
    # Reports come seldom, decisions often.
    _steps_of: CostReport | None = None
    _steps_s: tuple[float, ...] = ()

    def steps_s(self, max_gamma: int) -> tuple[float, ...]:
        """[γ]: a pass if every row of the batch brings γ draft tokens."""
        report = self.report()
        if report is not self._steps_of or len(self._steps_s) <= max_gamma:
            rows = report.mean_num_rows
            self._steps_of = report
            self._steps_s = tuple(report.pass_s(rows * (g + 1), rows) for g in range(max_gamma + 1))
        return self._steps_s[: max_gamma + 1]


@dataclass
class DraftCosts:
    """What is known of one draft replica; `report` gives what it has last said."""

    report: Callable[[], CostReport] = CostReport
    # Beyond its own passes, from a commit to its proposal.
    overhead_s: float = 0.001


@dataclass
class PairRates:
    """What is known of the two models, whichever replicas serve them."""

    survival: AcceptanceModel = field(default_factory=AcceptanceModel)
    # For operators: look-ahead, and round trips where somebody wants to know.
    num_lookahead_hits: int = 0
    num_lookahead_misses: int = 0
    # What a new generation starts from.
    lookahead_hit_rate: float = 0.5
    # Of all generations' plain rounds: many short ones try as often as one long one.
    probing: Probing = field(default_factory=Probing)
    verify_round_trip: Distribution | None = None
    draft_round_trip: Distribution | None = None


class PairCosts:
    """What rounds cost at one generation's replicas, which change when it moves."""

    def __init__(
        self,
        target: Callable[[], CostReport] = CostReport,
        draft: Callable[[], CostReport] = CostReport,
        shared: PairRates | None = None,
    ) -> None:
        self.target_side = TargetCosts(target)
        self.draft_side = DraftCosts(draft)
        self.shared = shared or PairRates()

    @property
    def survival(self) -> AcceptanceModel:
        return self.shared.survival

    @property
    def probing(self) -> Probing:
        return self.shared.probing

    @property
    def lookahead_hit_rate(self) -> float:
        return self.shared.lookahead_hit_rate

    @property
    def target_overhead_s(self) -> float:
        return self.target_side.overhead_s

    @property
    def least_overhead_s(self) -> float:
        return self.target_side.least_overhead_s

    @property
    def draft_overhead_s(self) -> float:
        return self.draft_side.overhead_s

    @draft_overhead_s.setter
    def draft_overhead_s(self, seconds: float) -> None:
        self.draft_side.overhead_s = seconds

    def target(self) -> CostReport:
        return self.target_side.report()

    def draft(self) -> CostReport:
        return self.draft_side.report()

    def observe_result(self, latency_s: float, step_s: float, *, left_at_once: bool) -> None:
        """`left_at_once`: the row, right after the verdict before it."""
        if self.shared.verify_round_trip is not None:
            self.shared.verify_round_trip.observe(latency_s)
        side, overhead_s = self.target_side, max(0.0, latency_s - step_s)
        if not side.seen_step_s:
            side.least_overhead_s, side.seen_step_s = overhead_s, step_s
        side.least_overhead_s = min(overhead_s, side.least_overhead_s * _LEAST_RISES)
        if left_at_once:
            side.overhead_s += SMOOTHING * (overhead_s - side.overhead_s)
            side.seen_step_s += SMOOTHING * (step_s - side.seen_step_s)

    def overhead_s(self, step_s: float) -> float:
        """Of a round whose pass takes so long. Beyond the least, rows wait for others' passes.

        Those have draft tokens too, as many as are chosen here: the queue is longer with them.
        """
        least_s = min(self.least_overhead_s, self.target_overhead_s)
        return least_s + self._num_queued_passes * step_s

    @property
    def _num_queued_passes(self) -> float:
        """Of others, that a row waits for before its own."""
        seen_step_s = self.target_side.seen_step_s
        if not seen_step_s:
            return 0.0
        return max(0.0, self.target_overhead_s - self.least_overhead_s) / seen_step_s

    def plain_round_s(self, step_s: float) -> float:
        """Of γ = 0, whose pass takes `step_s` now: if all do without, all come back at once.

        Then the target has them in one pass: nobody waits for another's, but its rows are all. Else
        sessions that wait for drafts in turns, at a target that has thus two passes for one, would
        never find out what they all lose.
        """
        report = self.target()
        rows = report.mean_num_rows
        alone_s = step_s + self.overhead_s(step_s)
        if rows < _SEVERAL_ROWS:
            return alone_s
        together = rows * (1 + self._num_queued_passes)
        together_s = report.pass_s(together, together) + self.least_overhead_s
        return min(alone_s, together_s)

    def wait_costs_s(self, wait_s: float) -> float:
        """What a wait adds to a round. Where rows queue behind others' passes, it costs less.

        A row that would have queued for the next pass anyway can as well wait for its draft: this
        is how sessions under load come to work in cohorts.
        """
        return max(0.0, self.least_overhead_s + wait_s - self.target_overhead_s)

    def observe_proposal(self, waited_s: float, num_tokens: int, *, is_probe: bool = False) -> None:
        """Waited for, so long from its commit on. `is_probe`: what was known before is old."""
        if self.shared.draft_round_trip is not None:
            self.shared.draft_round_trip.observe(waited_s)
        self._took(waited_s, num_tokens, PROBE_SMOOTHING if is_probe else SMOOTHING)

    def _took(self, waited_s: float, num_tokens: int, smoothing: float = SMOOTHING) -> None:
        overhead_s = max(0.0, waited_s - num_tokens * self.draft_step_s)
        self.draft_overhead_s += smoothing * (overhead_s - self.draft_overhead_s)

    def observe_missing_proposal(self, waited_s: float, num_tokens: int) -> None:
        """Waited for in vain: it would have taken longer, say twice as long; never a good sign."""
        if 2 * waited_s - num_tokens * self.draft_step_s > self.draft_overhead_s:
            self._took(2 * waited_s, num_tokens)

    def observe_lookahead(self, *, is_hit: bool) -> None:
        """A round's proposal was here when the verdict before it came, or was not."""
        shared = self.shared
        shared.num_lookahead_hits += is_hit
        shared.num_lookahead_misses += not is_hit
        shared.lookahead_hit_rate += _HIT_SMOOTHING * (is_hit - shared.lookahead_hit_rate)

    def forget_lateness(self) -> None:
        """Nobody waits any more, so nothing new is learnt of it; a wait is tried again some day."""
        self.draft_overhead_s *= _LATENESS_LEFT

    @property
    def draft_step_s(self) -> float:
        report = self.draft()
        return report.pass_s(report.mean_num_rows, report.mean_num_rows)

    def draft_prompt_s(self, num_tokens: int) -> float:
        """At most about so long the draft is busy with a prompt before it can propose."""
        return _PROMPT_SLACK * self.draft().pass_s(num_tokens, 1)

    def target_steps_s(self, max_gamma: int) -> tuple[float, ...]:
        """[γ]: a pass if every row of the batch brings γ draft tokens."""
        return self.target_side.steps_s(max_gamma)


@dataclass(frozen=True)
class RoundValues:
    """What rounds with γ = 0, 1 ... draft tokens take and bring; times in seconds.

    `rounds_s`: with a proposal at hand; `waits_s`: until one is here that is asked for now, and
    `added_s` what that adds to a round; `at_hand`, `waited`: tokens per second.
    """

    tokens: tuple[float, ...]
    waits_s: tuple[float, ...]
    added_s: tuple[float, ...]
    rounds_s: tuple[float, ...]
    at_hand: tuple[float, ...]
    waited: tuple[float, ...]
    may_pay: bool
    slack_s: float

    @classmethod
    def of(
        cls,
        costs: PairCosts,
        steps_s: tuple[float, ...],
        survival: tuple[float, ...],
        miss_rate: float,
    ) -> RoundValues:
        draft_s = costs.draft_step_s
        gammas = range(len(steps_s))
        tokens = tuple(accumulate((1.0, *survival)))
        waits_s = tuple(costs.draft_overhead_s + g * draft_s if g else 0.0 for g in gammas)
        added_s = tuple(costs.wait_costs_s(wait_s) if wait_s else 0.0 for wait_s in waits_s)
        # A round is no shorter than the drafting that it hides: a token more, the guess.
        hidden_s = tuple((g + 1) * draft_s if g else 0.0 for g in gammas)
        drafted_s = zip(steps_s[1:], hidden_s[1:], strict=True)
        rounds_s = (
            costs.plain_round_s(steps_s[0]),
            *(max(s + costs.overhead_s(s), h) for s, h in drafted_s),
        )
        at_hand = tuple(tokens[g] / (rounds_s[g] + miss_rate * added_s[g]) for g in gammas)
        waited = tuple(tokens[g] / (rounds_s[g] + added_s[g]) for g in gammas)
        # If all draft tokens stood, and came at once.
        best_case = max((g + 1) / (rounds_s[g] + miss_rate * g * draft_s) for g in gammas)
        return cls(
            tokens=tokens,
            waits_s=waits_s,
            added_s=added_s,
            rounds_s=rounds_s,
            at_hand=at_hand,
            waited=waited,
            may_pay=best_case > at_hand[0],
            slack_s=max(0.0, costs.target_overhead_s - costs.least_overhead_s),
        )

    def of_waiting(self, gamma: int) -> float:
        """Tokens that a round with a wait brings beyond what its time would bring anyway."""
        duration_s = self.tokens[gamma] / self.waited[gamma]
        return self.tokens[gamma] - max(self.at_hand) * duration_s

    def worth_s(self, gamma: int) -> float:
        """The wait that is worth as much as none; what would be queued is had for nothing."""
        gain = self.of_waiting(gamma) - self.of_waiting(0)
        return self.added_s[gamma] + gain / max(self.at_hand) + self.slack_s
