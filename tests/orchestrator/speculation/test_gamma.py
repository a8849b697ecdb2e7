"""γ policy: choices for given costs, how they settle, and that good drafts are found again.

Rounds are simulated: a draft of given acceptance and speed, and reported costs. No test waits.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from orchestrator.speculation.comparison import NUM_MEASURED_ROUNDS
from orchestrator.speculation.gamma import GammaDecision, GammaPolicy
from orchestrator.speculation.round_costs import (
    DraftCosts,
    DraftStatistics,
    PairCosts,
    TargetCosts,
)
from outrider.replica import CostReport

MAX_GAMMA = 16
# A pass over one token; the unit of all other times.
PASS_S = 0.02
OVERHEAD_S = 0.001


@dataclass
class Tiers:
    """Costs reported by both tiers; fields may change between rounds."""

    token_s: float = 0.0  # each further token in a pass of the target
    draft_s: float = 0.1 * PASS_S
    num_rows: float = 1.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def _noisy(self, seconds: float) -> float:
        return seconds * (1 + self.noise * self._random.uniform(-1, 1))

    def target(self) -> CostReport:
        steps_s = tuple(self._noisy(PASS_S + self.token_s * (n - 1)) for n in (1, 17, 513))
        return CostReport((1, 17, 513), steps_s, 0.0, self.num_rows)

    def draft(self) -> CostReport:
        return CostReport((1,), (self._noisy(self.draft_s),), 0.0, 1.0)

    def costs(self) -> PairCosts:
        return PairCosts(TargetCosts(self.target), DraftCosts(self.draft))


def play(
    policy: GammaPolicy,
    num_rounds: int,
    acceptance: float,
    *,
    late_s: Callable[[int], float] | None = None,
    is_hit: bool = False,
    seed: int = 0,
) -> list[GammaDecision]:
    """Rounds with the policy's choices. `late_s(γ)`: time to a proposal; None: as reported."""
    chance, decisions = random.Random(seed), []
    for _ in range(num_rounds):
        decision = policy.decision
        decisions.append(decision)
        gamma = decision.gamma
        if gamma:
            policy.observe_lookahead(is_hit=is_hit)
        if not is_hit:
            gamma = decision.waiting_gamma
            needed_s = OVERHEAD_S + gamma * policy.costs.draft.step_s
            needed_s = late_s(gamma) if late_s is not None else needed_s
            if gamma and needed_s <= decision.wait_s:
                policy.observe_proposal(needed_s, gamma)
            elif gamma:
                policy.observe_missing_proposal(decision.wait_s)
                gamma = 0
        num_accepted = 0
        while num_accepted < gamma and chance.random() < acceptance:
            num_accepted += 1
        policy.observe_round(gamma, num_accepted, is_rejected=num_accepted < gamma)
        policy.costs.observe_result(OVERHEAD_S + PASS_S, PASS_S, has_waited=not is_hit)
    return decisions


def settled(tiers: Tiers, acceptance: float, num_rounds: int = 300, **how: bool) -> int:
    """γ after `num_rounds` rounds."""
    policy = GammaPolicy(tiers.costs(), MAX_GAMMA)
    play(policy, num_rounds, acceptance, **how)
    return policy.decision.gamma


def test_cheap_passes_and_good_drafts_have_a_large_gamma() -> None:
    assert settled(Tiers(draft_s=0.05 * PASS_S), 0.97) >= 10
    assert settled(Tiers(draft_s=0.05 * PASS_S), 0.97, is_hit=True) == MAX_GAMMA
    assert 3 <= settled(Tiers(), 0.8) <= 9


def test_gamma_is_0_where_drafts_cannot_pay() -> None:
    """Compute-bound passes: a draft token costs a pass. Also slow drafts that are bad."""
    for acceptance in (0.2, 0.8):
        assert settled(Tiers(token_s=PASS_S), acceptance, is_hit=True) == 0
    assert settled(Tiers(draft_s=0.5 * PASS_S), 0.2) == 0


def test_a_bad_draft_costs_next_to_nothing() -> None:
    """In 4000 rounds with α = 0.2 and a slow draft, few have draft tokens; probes become rarer."""
    tiers = Tiers(draft_s=0.5 * PASS_S)
    decisions = play(GammaPolicy(tiers.costs(), MAX_GAMMA), 4000, 0.2)
    drafted = [i for i, decision in enumerate(decisions) if decision.gamma]
    start, later = [i for i in drafted if i < 60], [i for i in drafted if i >= 60]
    assert len(start) < 50
    assert 4 <= len(later) < 60, "probes"
    pauses = [b - a for a, b in itertools.pairwise(later) if b - a > 4]
    assert pauses == sorted(pauses)
    assert max(pauses) <= 520


def test_what_can_never_pay_is_not_probed() -> None:
    """No probes where even drafts that are all accepted would be slower than none."""
    decisions = play(GammaPolicy(Tiers(draft_s=5 * PASS_S).costs(), MAX_GAMMA), 4000, 0.9)
    assert not any(decision.gamma for decision in decisions[100:])


@given(
    token_s=st.floats(0, 2 * PASS_S),
    draft_s=st.floats(0, PASS_S / (MAX_GAMMA + 1)),
    rows=st.lists(st.floats(1, 32), min_size=2, max_size=2).map(sorted),
)
def test_gamma_falls_with_the_batch_size(token_s: float, draft_s: float, rows: list[float]) -> None:
    """For drafts so fast that no round is as long as its drafting.

    Rounds that are as long as their drafting do not grow with the batch. So a larger batch may have
    a larger γ: 3 instead of 2 for token_s = 2**-14, draft_s = 0.3 passes, and 6 rows instead of 1.
    """
    few, many = (
        GammaPolicy(Tiers(token_s, draft_s, num_rows).costs(), MAX_GAMMA).decision
        for num_rows in rows
    )
    assert many.gamma <= few.gamma


@given(
    token_s=st.floats(0, PASS_S),
    draft_s=st.floats(0, PASS_S),
    shares=st.lists(st.integers(0, 20), min_size=2, max_size=2).map(sorted),
)
@settings(deadline=None)
def test_gamma_rises_with_the_acceptance_rate(
    token_s: float, draft_s: float, shares: list[int]
) -> None:
    """Two histories of the same rounds; in one of them fewer draft tokens were accepted."""
    chosen = []
    for share in shares:
        costs = Tiers(token_s, draft_s).costs()
        for number in range(100):
            num_accepted = MAX_GAMMA if number % 20 < share else 0
            is_rejected = num_accepted < MAX_GAMMA
            costs.model.acceptance.observe(MAX_GAMMA, num_accepted, is_rejected=is_rejected)
        chosen.append(GammaPolicy(costs, MAX_GAMMA).decision.gamma)
    assert chosen == sorted(chosen)


@pytest.mark.parametrize("acceptance", [0.6, 0.8, 0.9])
def test_noise_in_the_costs_does_not_change_gamma(acceptance: float) -> None:
    """Reported costs vary by 2 %; the history of acceptance stays as it is."""
    tiers = Tiers(token_s=0.02 * PASS_S)
    policy = GammaPolicy(tiers.costs(), MAX_GAMMA)
    play(policy, 300, acceptance, is_hit=True)
    tiers.noise = 0.01
    chosen = []
    for _ in range(500):
        policy.observe_round(0, 0, is_rejected=False)
        chosen.append(policy.decision.gamma)
    changes = sum(a != b for a, b in itertools.pairwise(chosen))
    assert changes <= 2
    assert min(chosen) > 0


def test_gamma_follows_lasting_changes_of_the_costs() -> None:
    tiers = Tiers()
    policy = GammaPolicy(tiers.costs(), MAX_GAMMA)
    play(policy, 200, 0.85)
    assert policy.decision.gamma >= 4
    tiers.token_s = PASS_S  # the batch is full now
    play(policy, 20, 0.85)
    assert policy.decision.gamma == 0
    tiers.token_s = 0.0
    play(policy, 20, 0.85)
    assert policy.decision.gamma >= 4


@pytest.mark.parametrize(("num_bad", "seed"), [(40, 0), (400, 1), (4000, 2)])
def test_good_drafts_are_found_again(num_bad: int, seed: int) -> None:
    """At the next probe if all are accepted (about 512 rounds); at about the fifth with α = 0.9."""
    for acceptance, num_rounds in ((1.0, 700), (0.9, 6000)):
        policy = GammaPolicy(Tiers(draft_s=0.5 * PASS_S).costs(), MAX_GAMMA)
        assert play(policy, num_bad, 0.0, seed=seed)[-1].gamma == 0
        play(policy, num_rounds, acceptance, seed=seed)
        last = play(policy, 40, acceptance, seed=seed)
        assert all(decision.gamma for decision in last)


def test_good_drafts_are_found_again_by_short_outputs_together() -> None:
    """Each has fewer rounds than the probe interval. (They used to have no probe at all.)"""
    tiers = Tiers(draft_s=0.5 * PASS_S)
    costs = tiers.costs()
    for seed in range(40):
        play(GammaPolicy(costs, MAX_GAMMA), 24, 0.0, seed=seed)
    assert GammaPolicy(costs, MAX_GAMMA).decision.gamma == 0
    # Interleaved, like many streams at once.
    for _ in range(25):
        policies = [GammaPolicy(costs, MAX_GAMMA) for _ in range(8)]
        for number in range(24):
            for policy in policies:
                play(policy, 1, 0.95, seed=number)
    assert policies[0].decision.gamma >= 1


def test_a_probe_lasts_until_it_has_a_result() -> None:
    """The draft may have to open the session first, or to catch up. The probe is bounded."""
    policy = GammaPolicy(Tiers(draft_s=0.5 * PASS_S).costs(), MAX_GAMMA)
    assert play(policy, 400, 0.0)[-1].gamma == 0
    while policy.decision.gamma == 0:
        policy.observe_round(0, 0, is_rejected=False)
    num_rounds = 0
    while policy.decision.gamma:
        policy.observe_round(0, 0, is_rejected=False)  # no proposal, and no wait for one
        num_rounds += 1
    assert 8 <= num_rounds <= 20
    while policy.decision.gamma == 0:
        policy.observe_round(0, 0, is_rejected=False)
    policy.observe_round(2, 0, is_rejected=True)
    assert policy.decision.gamma == 0, "the result is known"


def test_results_of_probes_outweigh_old_measurements() -> None:
    """Drafts are late at first. Later they are in time, but one round in hundreds shows it."""
    tiers = Tiers(draft_s=0.2 * PASS_S)
    policy = GammaPolicy(tiers.costs(), MAX_GAMMA)
    decisions = play(policy, 500, 0.9, late_s=lambda gamma: 5 * PASS_S)
    assert decisions[-1].waiting_gamma == 0
    policy.costs.draft.overhead_s = 5 * PASS_S
    assert play(policy, 3000, 0.9)[-1].waiting_gamma > 0


def test_alternating_batches_are_left_if_plain_decoding_is_better() -> None:
    """Each half waits for the pass of the other one, with drafts that bring little.

    Four streams used to stay at γ = 1 with α = 0.2, at 0.75 of plain decoding.
    """
    tiers = Tiers(token_s=0.02 * PASS_S, draft_s=0.2 * PASS_S, num_rows=2)
    for acceptance, is_plain in ((0.2, True), (0.8, False)):
        policy, chance = GammaPolicy(tiers.costs(), MAX_GAMMA), random.Random(0)
        for number in range(600):
            gamma = min(1, policy.decision.gamma) if is_plain else policy.decision.gamma
            num_accepted = 0
            while num_accepted < gamma and chance.random() < acceptance:
                num_accepted += 1
            if gamma:
                policy.observe_lookahead(is_hit=True)
            policy.observe_round(gamma, num_accepted, is_rejected=num_accepted < gamma)
            num_passes = 1 if number % 50 == 0 else 2
            policy.costs.observe_result(OVERHEAD_S + num_passes * PASS_S, PASS_S, has_waited=False)
        assert (policy.decision.gamma == 0) == is_plain


def test_a_queue_is_as_long_as_the_passes_before_it() -> None:
    """Verify requests of 64 generations wait for one pass of others that chose the same γ.

    So γ is not larger than without the queue. With a constant queue time 16 draft tokens seemed
    cheap, at half the throughput of plain decoding.
    """
    chosen = []
    for num_passes in (1, 2):
        tiers = Tiers(token_s=0.01 * PASS_S, draft_s=0.01 * PASS_S, num_rows=64)
        policy = GammaPolicy(tiers.costs(), MAX_GAMMA)
        chance = random.Random(0)
        for number in range(1000):
            gamma, num_accepted = policy.decision.gamma, 0
            while num_accepted < gamma and chance.random() < 0.8:
                num_accepted += 1
            if gamma:
                policy.observe_lookahead(is_hit=True)
            policy.observe_round(gamma, num_accepted, is_rejected=num_accepted < gamma)
            step_s = policy.decision.target_step_s[gamma]
            is_first = number % 50 == 0
            latency_s = OVERHEAD_S + (1 if is_first else num_passes) * step_s
            policy.costs.observe_result(latency_s, step_s, has_waited=False)
        chosen.append(policy.decision.gamma)
    assert chosen[1] <= chosen[0] <= 3


def test_a_draft_that_is_always_late_is_hardly_waited_for() -> None:
    """The share of waiting falls towards 0, for a chosen γ and for a request's own."""
    for fixed in (None, 5):
        policy = GammaPolicy(Tiers().costs(), MAX_GAMMA, fixed=fixed)
        decisions = play(policy, 3000, 0.8, late_s=lambda _: 50 * PASS_S)
        waited_s = [decision.wait_s for decision in decisions if decision.waiting_gamma]
        assert sum(waited_s[:100]) < 60 * PASS_S, "until that is known"
        wait_s = 0.11 * PASS_S if fixed else 0.0
        assert sum(waited_s[100:]) < len(waited_s) * wait_s + 60 * PASS_S


@pytest.mark.parametrize("fixed", [None, 5])
def test_a_draft_that_is_in_time_again_is_waited_for(fixed: int | None) -> None:
    policy = GammaPolicy(Tiers().costs(), MAX_GAMMA, fixed=fixed)
    play(policy, 1000, 0.9, late_s=lambda _: 50 * PASS_S)
    play(policy, 6000, 0.9)
    decision = policy.decision
    assert decision.waiting_gamma >= 2
    assert decision.wait_s > OVERHEAD_S + decision.waiting_gamma * 0.1 * PASS_S


def test_a_draft_lost_during_a_wait_does_not_change_the_estimates() -> None:
    """A wait that ended at once shows neither a slow draft nor a fast one."""
    costs = Tiers().costs()
    policy = GammaPolicy(costs, MAX_GAMMA, fixed=5, fixed_wait_s=20.0)
    before_s = costs.draft.overhead_s
    for _ in range(50):
        policy.observe_missing_proposal(0.0)
        policy.observe_round(0, 0, is_rejected=False)
    assert costs.draft.overhead_s == before_s


@given(fixed=st.integers(0, MAX_GAMMA), acceptance=st.floats(0, 1), token_s=st.floats(0, PASS_S))
@settings(deadline=None, max_examples=30)
def test_a_requests_own_gamma_is_used(fixed: int, acceptance: float, token_s: float) -> None:
    policy = GammaPolicy(Tiers(token_s).costs(), MAX_GAMMA, fixed=fixed)
    for decision in play(policy, 100, acceptance):
        assert (decision.gamma, decision.waiting_gamma) == (fixed, fixed)
        assert decision.is_fixed


@given(max_gamma=st.integers(0, MAX_GAMMA), fixed=st.none() | st.integers(0, MAX_GAMMA))
def test_decision_before_costs_are_reported(max_gamma: int, fixed: int | None) -> None:
    fixed = None if fixed is None else min(fixed, max_gamma)
    decision = GammaPolicy(PairCosts(), max_gamma, fixed=fixed).decision
    assert (
        decision.gamma == decision.waiting_gamma == (min(5, max_gamma) if fixed is None else fixed)
    )
    assert 0 < decision.wait_s <= 1
    waiting = GammaPolicy(PairCosts(), max_gamma, fixed=fixed, fixed_wait_s=0.25).decision
    assert waiting.wait_s == 0.25


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["round", "hit", "miss", "missing", "proposal", "result"]),
        st.floats(0, 1e4),
        st.integers(0, MAX_GAMMA),
        st.integers(0, MAX_GAMMA),
    ),
    max_size=40,
)
SECONDS = st.floats(0, 1e4, allow_subnormal=False)


@given(
    events=EVENTS,
    target=st.lists(SECONDS, min_size=1, max_size=4).map(sorted),
    draft=st.lists(SECONDS, min_size=1, max_size=4).map(sorted),
    row_s=SECONDS,
    num_rows=st.floats(1, 1e4),
    max_gamma=st.integers(0, MAX_GAMMA),
    fixed=st.none() | st.integers(0, MAX_GAMMA),
)
@settings(deadline=None, max_examples=150)
def test_decisions_are_consistent_after_any_history(
    events: list[tuple[str, float, int, int]],
    target: list[float],
    draft: list[float],
    row_s: float,
    num_rows: float,
    max_gamma: int,
    fixed: int | None,
) -> None:
    reports = [
        CostReport(tuple(4**i for i in range(len(steps_s))), tuple(steps_s), row_s, num_rows)
        for steps_s in (target, draft)
    ]
    costs = PairCosts(TargetCosts(lambda: reports[0]), DraftCosts(lambda: reports[1]))
    fixed = None if fixed is None else min(fixed, max_gamma)
    policy = GammaPolicy(costs, max_gamma, fixed=fixed)
    check(policy.decision, max_gamma)
    for kind, seconds, one, other in events:
        if kind == "round":
            gamma = min(max(one, other), max_gamma)
            num_accepted = min(one, other, gamma)
            policy.observe_round(gamma, num_accepted, is_rejected=num_accepted < gamma)
        elif kind in ("hit", "miss"):
            policy.observe_lookahead(is_hit=kind == "hit")
        elif kind == "missing":
            policy.observe_missing_proposal(seconds)
        elif kind == "proposal":
            policy.observe_proposal(seconds, one)
        else:
            costs.observe_result(seconds, one * 100.0, has_waited=not other % 2)
        check(policy.decision, max_gamma)


def check(decision: GammaDecision, max_gamma: int) -> None:
    numbers = [x for value in asdict(decision).values() for x in _flat(value)]
    assert all(math.isfinite(number) for number in numbers), decision
    assert 0 <= decision.waiting_gamma <= decision.gamma <= max_gamma
    assert decision.wait_s > 0
    assert len(decision.survival) == max_gamma
    if not decision.tokens_per_s:
        return
    for rates in (decision.tokens_per_s, decision.waiting_tokens_per_s, decision.target_step_s):
        assert len(rates) == max_gamma + 1
        assert min(rates) > 0
    # A proposal that may be ready is worth no less than one that is waited for.
    for ready, waited in zip(decision.tokens_per_s, decision.waiting_tokens_per_s, strict=True):
        assert ready >= waited * (1 - 1e-9)
    round_s = decision.target_step_s[0] + max(0.0, decision.target_overhead_s)
    wait_s = decision.draft_overhead_s + decision.waiting_gamma * decision.draft_step_s
    assert decision.wait_s <= max(3 * wait_s + round_s, round_s) * (1 + 1e-9)
    is_probe = not decision.is_fixed and decision.gamma in (1, 2)
    if not decision.is_fixed and not is_probe:
        # Plain decoding is left for 10 % more, one γ for another for 3 %.
        short_of = 1.03 if decision.gamma else 1.1
        best = max(decision.tokens_per_s)
        assert decision.tokens_per_s[decision.gamma] >= best / short_of * (1 - 1e-9)


def _flat(value: object) -> list[float]:
    if isinstance(value, tuple):
        return [float(x) for x in value]
    assert isinstance(value, int | float)
    return [float(value)]


def test_another_draft_model_has_its_own_acceptance() -> None:
    """As when a generation moves to a replica with another draft revision."""
    costs = Tiers(token_s=0.02 * PASS_S).costs()
    policy = GammaPolicy(costs, MAX_GAMMA)
    play(policy, 300, 0.0, is_hit=True)
    assert policy.decision.survival[0] < 0.2
    policy.use_model(costs.model)
    assert policy.decision.survival[0] < 0.2, "it is the same one"
    other = DraftStatistics()
    policy.use_model(other)
    assert policy.decision.survival[0] > 0.5
    play(policy, 300, 0.9, is_hit=True)
    assert other.acceptance.survival(1)[0] > 0.7
    assert GammaPolicy(costs, MAX_GAMMA).decision.survival[0] > 0.7, "its costs have that model now"


def test_a_compared_generation_measures_a_draft_that_does_not_pay() -> None:
    """Otherwise a bad draft would get no more draft tokens, and its comparison would never end."""
    costs = Tiers(token_s=PASS_S).costs()
    play(GammaPolicy(costs, MAX_GAMMA), 1_000, 0.1)
    assert GammaPolicy(costs, MAX_GAMMA).decision.gamma == 0
    policy = GammaPolicy(costs, MAX_GAMMA, num_measured_rounds=NUM_MEASURED_ROUNDS)
    decisions = play(policy, 200, 0.1)
    waited = [decision.waiting_gamma > 0 for decision in decisions]
    assert all(waited[:NUM_MEASURED_ROUNDS])
    assert not any(waited[NUM_MEASURED_ROUNDS : NUM_MEASURED_ROUNDS + 20])
