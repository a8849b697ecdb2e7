"""Sequential tests of sampled verification, over all audited generations of an orchestrator.

Three hypotheses that hold if verification is exact. `acceptance`: a draft token is accepted with
probability min(1, target/draft). `identity`: before the draft token is sampled, that is
Σ min(target, draft). `position`: the emitted token's position in the target's cumulative
distribution is uniform. Each test begins anew after a period, so that a defect that comes late is
found as fast as one at the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import structlog

from orchestrator.audit.sequential import (
    NUM_ACCEPTANCE_ALTERNATIVES,
    Evidence,
    Floats,
    acceptance_information,
    acceptance_ratios,
    position_ratios,
    tilt_ratios,
)
from orchestrator.audit.trials import acceptance_trials, emitted_positions
from orchestrator.generation.observation import ObservedRound
from orchestrator.generation.state import GenerationState
from outrider.sampling.params import Verification

log = structlog.get_logger()

TESTS = ("acceptance", "identity", "position")
PERIOD_S = 86_400.0
# Relative error of acceptance probabilities for which `acceptance` states how fast it is found.
STATED_BIAS = 0.01


@dataclass
class SequentialTest:
    """One test in its present period. `alarm_at`: log-evidence of an alarm.

    `num_alarms`: since the start; at most one a period.
    """

    name: str
    alarm_at: float
    started_at: float
    evidence: Evidence = field(default_factory=Evidence)
    num_trials: int = 0
    observed_sum: float = 0.0
    expected_sum: float = 0.0
    information_sum: float = 0.0
    num_alarms: int = 0
    has_alarm: bool = False

    @property
    def observed(self) -> float:
        """Mean of the trials' outcomes; 0 without trials."""
        return self.observed_sum / self.num_trials if self.num_trials else 0.0

    @property
    def expected(self) -> float:
        """Mean of their expectations under the hypothesis."""
        return self.expected_sum / self.num_trials if self.num_trials else 0.0

    @property
    def expected_trials(self) -> float:
        """Expected number of trials until a bias of `STATED_BIAS` raises an alarm; 0: unknown."""
        if not self.information_sum:
            return 0.0
        needed = self.alarm_at + math.log(NUM_ACCEPTANCE_ALTERNATIVES)
        return needed * self.num_trials / self.information_sum

    def add(self, observed: float, expected: float, log_ratios: Floats) -> None:
        """Adds a trial; raises the alarm when the evidence suffices."""
        self.num_trials += 1
        self.observed_sum += observed
        self.expected_sum += expected
        self.evidence.add(log_ratios)
        if self.evidence.log_evidence >= self.alarm_at and not self.has_alarm:
            self.has_alarm = True
            self.num_alarms += 1
            log.error(
                "audit_alarm",
                test=self.name,
                num_trials=self.num_trials,
                observed=self.observed,
                expected=self.expected,
                log_evidence=self.evidence.log_evidence,
            )

    def begin_anew(self, now: float) -> None:
        """Begins a new period; the number of alarms does not change."""
        self.evidence, self.started_at, self.has_alarm = Evidence(), now, False
        self.num_trials = 0
        self.observed_sum = self.expected_sum = self.information_sum = 0.0


class SampledTests:
    """The tests of one orchestrator. `observer` makes the observer of an audited generation.

    `false_alarm_probability`: bound on the probability that any test raises a false alarm in one
    period; each test gets an equal part. `clock`: seconds.
    """

    def __init__(
        self,
        false_alarm_probability: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.false_alarm_probability = false_alarm_probability
        self._clock = clock
        alarm_at = math.log(len(TESTS) / false_alarm_probability)
        self.tests: Mapping[str, SequentialTest] = {
            name: SequentialTest(name, alarm_at, clock()) for name in TESTS
        }
        # Not the generations' own randomness, which the tests are about.
        self._rng = np.random.default_rng()

    @property
    def age_s(self) -> float:
        """Seconds since the present period began."""
        return self._clock() - self.tests[TESTS[0]].started_at

    def observer(self, verification: Verification) -> SampledObserver:
        """The observer of a generation whose seed is random."""
        return SampledObserver(self, verification)

    def add(self, committed: ObservedRound, verification: Verification) -> None:
        """Adds the trials of a round. Takes about 0.03 ms of a core for a draft token."""
        if committed.proposal is None or committed.proposal.supports is None:
            return
        if self.age_s > PERIOD_S:
            for test in self.tests.values():
                test.begin_anew(self._clock())
        acceptance, identity, position = (self.tests[name] for name in TESTS)
        for trial in acceptance_trials(committed, verification):
            accepted = trial.accepted
            acceptance.add(accepted, trial.prob, acceptance_ratios(accepted, trial.prob))
            acceptance.information_sum += acceptance_information(trial.prob, STATED_BIAS)
            identity.add(accepted, trial.mean_prob, tilt_ratios(accepted, trial.mean_prob))
        for place in emitted_positions(committed, verification, self._rng):
            position.add(place, 0.5, position_ratios(place))


class SampledObserver:
    """Observer that adds a generation's rounds to the tests as they are committed."""

    num_logprobs: int | None = None

    def __init__(self, tests: SampledTests, verification: Verification) -> None:
        self._tests = tests
        self._verification = verification

    def observe(self, committed: ObservedRound) -> None:
        """Adds the round. At once: choosing rounds by how the generation ends would bias tests."""
        self._tests.add(committed, self._verification)

    def ended(self, state: GenerationState) -> None:
        """Nothing is left to add."""
