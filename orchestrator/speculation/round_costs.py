"""Measured costs of rounds: what replicas report and what is measured beyond it.

Each replica reports how long its passes take (`CostReport`). Overhead is what a round takes beyond
these passes: network, queues, and scheduling. `round_values` makes tokens per second of both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.speculation.acceptance import AcceptanceModel, MatchAcceptance
from orchestrator.speculation.probing import ProbeSchedule
from orchestrator.speculation.verification import Choices
from outrider.replica import CostReport
from outrider.telemetry.distribution import Distribution

# Weight of the newest value in moving averages. Choice: about the last ten rounds count.
SMOOTHING = 0.1
# The same for values found by probes. Choice: they are rare, so three of them count 80 %.
PROBE_SMOOTHING = 0.4
# The same for look-ahead hits of all generations. Choice: about the last hundred rounds count.
_HIT_SMOOTHING = 0.01
# Overhead before anything is measured. Choice: about a round trip within a rack.
_FIRST_OVERHEAD_S = 0.001
# Growth of the smallest overhead per result, so that a slower network is noticed. Choice:
# 70 results double it.
_MIN_OVERHEAD_GROWTH = 1.01
# A proposal that did not come in time counts as one that takes this many times the wait. With 1
# the estimate would stay at the longest wait, and late drafts would always be waited for.
_MISSING_FACTOR = 2
# A prompt's pass takes more than reported for short passes: attention is quadratic. Choice.
_PROMPT_FACTOR = 2.0


@dataclass
class TargetCosts:
    """Costs of one target replica. `report` returns its last report."""

    report: Callable[[], CostReport] = CostReport
    # From a verify request to its result, beyond the replica's own pass: network and queue.
    overhead_s: float = _FIRST_OVERHEAD_S
    # About the smallest of these: no queue.
    min_overhead_s: float = _FIRST_OVERHEAD_S
    # Pass times at the moments when the overhead was measured; 0: none yet.
    mean_step_s: float = 0.0
    # Steps of the report that they were made from: reports are rarer than decisions.
    _steps_of: CostReport | None = None
    _steps_s: tuple[float, ...] = ()

    @property
    def queue_s(self) -> float:
        """Time in the queue: a verify request waits there for passes of other generations."""
        return max(0.0, self.overhead_s - self.min_overhead_s)

    @property
    def num_queued_passes(self) -> float:
        """Passes of other generations that a verify request waits for."""
        return self.queue_s / self.mean_step_s if self.mean_step_s else 0.0

    def steps_s(self, max_gamma: int) -> tuple[float, ...]:
        """[γ]: seconds of a pass if every verify request of the batch has γ draft tokens."""
        report = self.report()
        if report is not self._steps_of or len(self._steps_s) <= max_gamma:
            rows = report.mean_num_rows
            self._steps_of = report
            self._steps_s = tuple(report.pass_s(rows * (g + 1), rows) for g in range(max_gamma + 1))
        return self._steps_s[: max_gamma + 1]

    def observe_result(self, latency_s: float, step_s: float, *, has_waited: bool) -> None:
        """As `PairCosts.observe_result`."""
        overhead_s = max(0.0, latency_s - step_s)
        if not self.mean_step_s:
            self.min_overhead_s, self.mean_step_s = overhead_s, step_s
        self.min_overhead_s = min(overhead_s, self.min_overhead_s * _MIN_OVERHEAD_GROWTH)
        if not has_waited:
            self.overhead_s += SMOOTHING * (overhead_s - self.overhead_s)
            self.mean_step_s += SMOOTHING * (step_s - self.mean_step_s)


@dataclass
class DraftCosts:
    """Costs of one draft replica. `report` returns its last report."""

    report: Callable[[], CostReport] = CostReport
    # From a commit to its proposal, beyond the replica's own passes.
    overhead_s: float = _FIRST_OVERHEAD_S

    @property
    def step_s(self) -> float:
        """Seconds per draft token."""
        report = self.report()
        return report.pass_s(report.mean_num_rows, report.mean_num_rows)

    def prompt_s(self, num_tokens: int) -> float:
        """Upper estimate of the time that the draft needs for a prompt before it can propose."""
        return _PROMPT_FACTOR * self.report().pass_s(num_tokens, 1)

    def observe_proposal(self, waited_s: float, num_tokens: int, smoothing: float) -> None:
        """A proposal of `num_tokens` came `waited_s` after its commit."""
        overhead_s = max(0.0, waited_s - num_tokens * self.step_s)
        self.overhead_s += smoothing * (overhead_s - self.overhead_s)

    def observe_missing_proposal(self, waited_s: float, num_tokens: int) -> None:
        """No proposal came within `waited_s`. This never lowers the overhead."""
        took_s = _MISSING_FACTOR * waited_s
        if took_s - num_tokens * self.step_s > self.overhead_s:
            self.observe_proposal(took_s, num_tokens, SMOOTHING)

    def reduce_overhead(self, factor: float) -> None:
        """Makes the estimate more optimistic, so that waiting is tried again some time."""
        self.overhead_s *= factor


@dataclass
class DraftStatistics:
    """Statistics of one draft model over all generations, whichever replicas serve it."""

    acceptance: AcceptanceModel = field(default_factory=AcceptanceModel)
    # Short generations together probe as often as one long one.
    probes: ProbeSchedule = field(default_factory=ProbeSchedule)


@dataclass
class PairStatistics:
    """Statistics of both tiers over all generations, whichever replicas serve them."""

    # Acceptance of prompt lookup, which needs no draft.
    matches: MatchAcceptance = field(default_factory=MatchAcceptance)
    # New generations start with this rate. Choice for the first one: no preference.
    lookahead_hit_rate: float = 0.5
    # For metrics only.
    num_lookahead_hits: int = 0
    num_lookahead_misses: int = 0
    # Rounds by chosen source and reason, see `router`.
    choices: Choices = field(default_factory=Counter)
    verify_round_trip: Distribution | None = None
    draft_round_trip: Distribution | None = None

    def observe_lookahead(self, *, is_hit: bool) -> None:
        """Whether a round's proposal had arrived before the verify result that it follows."""
        self.num_lookahead_hits += is_hit
        self.num_lookahead_misses += not is_hit
        self.lookahead_hit_rate += _HIT_SMOOTHING * (is_hit - self.lookahead_hit_rate)


class PairCosts:
    """Costs of one generation's rounds. `target`, `draft` and `model` change when it moves.

    `model`: statistics of the draft model in use.
    """

    def __init__(
        self,
        target: TargetCosts | None = None,
        draft: DraftCosts | None = None,
        shared: PairStatistics | None = None,
        model: DraftStatistics | None = None,
    ) -> None:
        self.target = target or TargetCosts()
        self.draft = draft or DraftCosts()
        self.shared = shared or PairStatistics()
        self.model = model or DraftStatistics()

    def observe_result(self, latency_s: float, step_s: float, *, has_waited: bool) -> None:
        """A verify result came `latency_s` after its request; its pass took `step_s`.

        `has_waited`: the request was delayed for a proposal, so its queue is not typical.
        """
        if self.shared.verify_round_trip is not None:
            self.shared.verify_round_trip.observe(latency_s)
        self.target.observe_result(latency_s, step_s, has_waited=has_waited)

    def observe_proposal(self, waited_s: float, num_tokens: int, *, is_probe: bool = False) -> None:
        """A proposal of `num_tokens` came `waited_s` after its commit.

        `is_probe`: nothing was measured for a while, so this counts more.
        """
        if self.shared.draft_round_trip is not None:
            self.shared.draft_round_trip.observe(waited_s)
        smoothing = PROBE_SMOOTHING if is_probe else SMOOTHING
        self.draft.observe_proposal(waited_s, num_tokens, smoothing)

    def observe_missing_proposal(self, waited_s: float, num_tokens: int) -> None:
        """No proposal came within `waited_s`."""
        self.draft.observe_missing_proposal(waited_s, num_tokens)
