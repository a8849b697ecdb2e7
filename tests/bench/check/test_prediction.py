"""Predicted speed-ups: limits that the formulas of the field give, networks, streams."""

from __future__ import annotations

import pytest

from outrider.replica import CostReport
from outrider.sampling.formulas import mean_acceptance_length, speedup_sequential
from outrider_bench.check.prediction import PairCost, Prediction, Situation, hit_rate_at, predicted

TARGET_S, DRAFT_S = 0.020, 0.002
MAX_GAMMA = 12


def costs(overhead_s: float = 0.0, *, row_s: float = 0.0, knee: int = 4096) -> PairCost:
    """Passes that cost the same up to `knee` tokens, and twice that at twice as many."""
    target = CostReport((1, knee, 2 * knee), (TARGET_S, TARGET_S, 2 * TARGET_S))
    return PairCost(target, CostReport((1,), (DRAFT_S,), row_s), overhead_s, overhead_s)


def tokens(alpha: float) -> list[float]:
    return [mean_acceptance_length(alpha, gamma) for gamma in range(MAX_GAMMA + 1)]


def at(alpha: float, cost: PairCost, situation: Situation, hit_rate: float = 1.0) -> Prediction:
    return predicted(cost, tokens(alpha), situation, hit_rate)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 0.9])
def test_in_turn_is_leviathans_formula_without_overheads(alpha: float) -> None:
    found = at(alpha, costs(), Situation(1)).in_turn
    expected = [speedup_sequential(alpha, g, DRAFT_S / TARGET_S) for g in range(MAX_GAMMA + 1)]
    assert found == pytest.approx(expected)


def test_ahead_hides_the_drafting_until_it_takes_longer_than_a_pass() -> None:
    found = at(0.8, costs(), Situation(1)).ahead
    for gamma in range(1, MAX_GAMMA + 1):
        hidden_s = max(TARGET_S, (gamma + 1) * DRAFT_S)
        assert found[gamma] == pytest.approx(tokens(0.8)[gamma] * TARGET_S / hidden_s)


def test_drafts_that_are_never_ready_are_as_good_as_in_turn() -> None:
    """While the draft keeps up: what it drafts for other outcomes takes no longer than the pass."""
    found = at(0.8, costs(), Situation(1), hit_rate=0.0)
    assert found.ahead[:10] == pytest.approx(found.in_turn[:10])


def test_a_network_costs_a_round_trip_in_turn_and_guesses_ahead() -> None:
    near, far = (at(0.8, costs(0.001), Situation(1, rtt_s), 0.9) for rtt_s in (0.0, 0.05))
    gamma = 5
    plain_s = TARGET_S + 0.001
    near_s = tokens(0.8)[gamma] * plain_s / near.in_turn[gamma]
    assert tokens(0.8)[gamma] * plain_s / far.in_turn[gamma] == pytest.approx(near_s + 0.05)
    assert 1 < far.ahead[gamma] < near.ahead[gamma]
    assert far.ahead[gamma] > far.in_turn[gamma]
    # Two and a half rounds have to be guessed.
    assert hit_rate_at(0.9, costs(), Situation(1, 0.05)) == pytest.approx(0.9**2.5)
    assert hit_rate_at(0.9, costs(), Situation(1, 0.001)) == 0.9


def test_a_saturated_target_leaves_no_room_for_draft_tokens() -> None:
    """From 16 tokens on a pass takes time in proportion, so a draft token costs a token's time."""
    by_streams = [at(0.6, costs(knee=16), Situation(num)) for num in (1, 4, 16, 64)]
    speed_ups = [found.speed_up for found in by_streams]
    assert speed_ups == sorted(speed_ups, reverse=True)
    assert speed_ups[0] > 2
    assert by_streams[-1].best_gamma == 0
    assert speed_ups[-1] == 1


def test_more_draft_replicas_help_where_rows_are_dear() -> None:
    dear = costs(row_s=0.001)
    one, four = (at(0.8, dear, Situation(32, 0.0, num)).speed_up for num in (1, 4))
    assert four > one


def test_the_ratio_is_of_passes_of_equal_batches() -> None:
    assert costs().ratio(1) == pytest.approx(0.1)
    assert costs(row_s=0.002).ratio(8) == pytest.approx(0.8)
