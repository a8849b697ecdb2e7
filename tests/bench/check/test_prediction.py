"""Predicted speed-ups: limits that the formulas of the field give, networks, streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider.replica import CostReport
from outrider.sampling.formulas import mean_acceptance_length, speedup_sequential
from outrider_bench.check.acceptance import Comparison
from outrider_bench.check.prediction import PairCost, Prediction, RoundShapes, Situation, predicted
from outrider_bench.check.results import round_shapes
from outrider_bench.commands.trials import Trial, predicted_gain

TARGET_S, DRAFT_S = 0.020, 0.002
MAX_GAMMA = 12
MEASURED = Path(__file__).parents[3] / "docs/benchmarks/scaling.json"


def costs(overhead_s: float = 0.0, *, row_s: float = 0.0, knee: int = 4096) -> PairCost:
    """Passes that cost the same up to `knee` tokens, and twice that at twice as many."""
    target = CostReport((1, knee, 2 * knee), (TARGET_S, TARGET_S, 2 * TARGET_S))
    return PairCost(target, CostReport((1,), (DRAFT_S,), row_s), overhead_s, overhead_s)


def at(alpha: float, cost: PairCost, situation: Situation, foreseen: float = 1.0) -> Prediction:
    return predicted(cost, RoundShapes.of_alpha(alpha, MAX_GAMMA, foreseen), situation)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 0.9])
def test_in_turn_is_leviathans_formula_without_overheads(alpha: float) -> None:
    found = at(alpha, costs(), Situation(1)).in_turn
    expected = [speedup_sequential(alpha, g, DRAFT_S / TARGET_S) for g in range(MAX_GAMMA + 1)]
    assert found == pytest.approx(expected)


def test_ahead_hides_the_drafting_if_every_outcome_is_foreseen_in_time() -> None:
    """A pass has the time of two blocks up to γ = 4, of one up to γ = 9."""
    found = at(0.8, costs(), Situation(1))
    for gamma in range(1, 5):
        assert found.ahead[gamma] == pytest.approx(mean_acceptance_length(0.8, gamma))
        assert found.hit_rates[gamma] == pytest.approx(1.0)
    assert found.hit_rates[9] == pytest.approx(0.5)
    assert found.ahead[9] < mean_acceptance_length(0.8, 9)


def test_unforeseen_outcomes_cost_the_drafting() -> None:
    sure, unsure = (at(0.8, costs(), Situation(1), foreseen) for foreseen in (1.0, 0.2))
    assert unsure.hit_rates[4] < sure.hit_rates[4]
    assert max(unsure.in_turn) < unsure.speed_up < sure.speed_up


def test_a_network_costs_a_round_trip_in_turn_and_less_ahead() -> None:
    near, far = (at(0.8, costs(0.001), Situation(1, rtt_s), 0.9) for rtt_s in (0.0, 0.02))
    gamma, plain_s = 4, TARGET_S + 0.001
    tokens = mean_acceptance_length(0.8, gamma)
    near_s, far_s = (tokens * plain_s / found.in_turn[gamma] for found in (near, far))
    assert far_s == pytest.approx(near_s + 0.02)
    assert 1 < far.ahead[gamma] < near.ahead[gamma]
    assert far.ahead[gamma] > far.in_turn[gamma]


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
    one, four = (at(0.8, dear, Situation(32, 0.0, num)) for num in (1, 4))
    assert four.speed_up > one.speed_up


def test_the_ratio_is_of_passes_of_equal_batches() -> None:
    assert costs().ratio(1) == pytest.approx(0.1)
    assert costs(row_s=0.002).ratio(8) == pytest.approx(0.8)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_shapes_of_texts_are_those_of_their_acceptance(alpha: float) -> None:
    num = 4000
    text = Comparison("", 1.0, 0, [0] * num, [alpha] * num, [alpha] * num, [True] * num, [3] * num)
    found, expected = round_shapes([text], 6), RoundShapes.of_alpha(alpha, 6, 1.0)
    assert found.tokens == pytest.approx(expected.tokens, rel=5e-3)
    assert found.all_accepted == pytest.approx(expected.all_accepted, rel=5e-3)
    assert found.foreseen_rejection == found.foreseen_bonus == 1.0


def test_candidates_are_those_of_the_draft_service() -> None:
    from outrider.engine.interface import NUM_CANDIDATES
    from outrider_bench.check import results

    assert results.NUM_CANDIDATES == NUM_CANDIDATES


def test_the_published_measurements_are_predicted_within_15_percent() -> None:
    """Simulated tiers on an idle machine, one to sixteen streams, with and without a network."""
    document = json.loads(MEASURED.read_text("utf-8"))
    rows = [row for row in document["results"] if row["num_drafts"]]
    assert len(rows) == 20
    names = ("ratio", "alpha", "round_trip_ms", "num_sessions", "num_drafts")
    for row in rows:
        trial = Trial(*(row[name] for name in names))
        gain = predicted_gain(document["options"]["pass_ms"], trial)
        assert gain == pytest.approx(row["over_plain"], rel=0.15), trial
