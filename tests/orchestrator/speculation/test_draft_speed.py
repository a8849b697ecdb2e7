"""Expected speed of drafts of different cost, and the acceptance rate that a slower one needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.speculation.draft_speed import MAX_HANDICAP, DraftSpeed, handicap
from outrider.replica import CostReport

TARGET = CostReport((1, 17), (0.02, 0.03))


def speed(step_s: float, miss_rate: float = 0.5) -> DraftSpeed:
    return DraftSpeed(TARGET, CostReport((1,), (step_s,)), miss_rate)


@pytest.mark.parametrize("step_s", [0.0005, 0.004, 0.016])
def test_speed_rises_with_acceptance_and_falls_with_cost(step_s: float) -> None:
    rates = [speed(step_s).tokens_per_s(alpha / 10) for alpha in range(11)]
    assert rates == sorted(set(rates))
    assert speed(2 * step_s).tokens_per_s(0.6) < rates[6]


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7])
def test_a_handicap_makes_both_equally_fast(alpha: float) -> None:
    slow, fast = speed(0.004), speed(0.002)
    needed = handicap(slow, fast, alpha)
    assert needed > 0
    assert slow.tokens_per_s(alpha + needed) == pytest.approx(fast.tokens_per_s(alpha))
    assert handicap(fast, slow, alpha + needed) == pytest.approx(-needed, abs=1e-6)


def test_without_a_measured_difference_there_is_none() -> None:
    """A factor of 1.2 is noise of the machines."""
    assert handicap(None, speed(0.002), 0.6) == 0
    assert handicap(speed(0.002), None, 0.6) == 0
    assert handicap(speed(0.0024), speed(0.002), 0.6) == 0


def test_drafts_of_one_size_cost_the_same() -> None:
    """A measured difference is that of their machines, which may be busy."""
    busy, idle = (replace(speed(s), draft_size="llama 1000 float32") for s in (0.02, 0.002))
    assert handicap(busy, idle, 0.6) == handicap(idle, busy, 0.6) == 0
    assert handicap(replace(busy, draft_size="llama 2000 float32"), idle, 0.6) > 0
    assert handicap(speed(0.02), speed(0.002), 0.6) > 0


def test_a_cost_alone_does_not_decide() -> None:
    """A cold replica reports any cost."""
    assert handicap(speed(0.5), speed(0.002), 0.6) == MAX_HANDICAP
    assert handicap(speed(0.002), speed(0.5), 0.6) == -MAX_HANDICAP
