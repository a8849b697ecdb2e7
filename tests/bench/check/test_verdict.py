"""The verdict: one line, worth it or not, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider_bench.check.cost import token_costs
from outrider_bench.check.prediction import Prediction, Situation
from outrider_bench.check.results import Acceptance, PassCost, SpeedUp
from outrider_bench.check.verdict import Verdict, verdict


def speed_up(
    temperature: float, num: int, predicted: float, measured: float | None = None
) -> SpeedUp:
    ahead = (1.0, 1.0, 1.0, max(1.0, predicted))
    prediction = Prediction(Situation(num), ahead, ahead)
    return SpeedUp(temperature, num, prediction, measured)


def given(*speed_ups: SpeedUp, refused: tuple[str, ...] = ()) -> Verdict:
    alpha = Acceptance("", 0, 100, 0.31, 0.3, "poor", 3, (0.3,), 1.4, 1.4)
    costs = [PassCost(1, 0.020, 0.005)]
    return verdict(refused, speed_ups, [alpha], costs, 1.1)


def test_a_good_pair_is_used_with_its_gamma_and_speed_ups() -> None:
    found = given(speed_up(0, 1, 2.5, 2.4), speed_up(0, 16, 1.4, 1.3))
    assert found.text == "use γ ≈ 3: 2.4x at one stream, 1.3x at 16 streams (measured)"
    assert found.is_worth_it


def test_without_a_measurement_the_prediction_counts_and_is_called_so() -> None:
    assert given(speed_up(0, 1, 2.0)).text == "use γ ≈ 3: 2.0x at one stream (predicted)"


def test_temperatures_give_a_range_and_bad_ones_are_named() -> None:
    found = given(speed_up(0, 4, 2.0), speed_up(0.7, 4, 1.5), speed_up(1, 4, 1.0))
    assert found.text == "use γ ≈ 3: 1.5 to 2.0x at 4 streams (predicted); not at T = 1"


def test_a_measurement_outweighs_a_better_prediction() -> None:
    found = given(speed_up(0, 1, 2.0, 0.9), speed_up(1, 1, 1.9, 1.05))
    assert not found.is_worth_it
    assert found.text == (
        "do not speculate: 1.05x at best (one stream, T = 1), less than 1.1x; α is 0.31, a draft "
        "step takes 0.25 of a target pass"
    )


def test_a_refused_pair_must_not_speculate() -> None:
    found = given(speed_up(0, 1, 3.0), refused=("pair: other tokens",))
    assert found == Verdict("do not speculate: pair: other tokens", False, 0.0)


def test_without_results_nothing_is_claimed() -> None:
    assert given().text.endswith("its speed was not measured")


def test_drafts_are_ranked_by_the_mean_of_their_speed_ups() -> None:
    one = given(speed_up(0, 1, 3.0), speed_up(0, 16, 1.0)).score
    two = given(speed_up(0, 1, 2.0), speed_up(0, 16, 1.8)).score
    assert two > one


def test_costs_are_per_million_tokens_and_count_the_drafts() -> None:
    """A target of 100 tokens/s at 3.6 an hour costs 10 per million; a draft adds a tenth."""
    one = replace(speed_up(0, 1, 2.0, 2.2), plain_tokens_per_s=100.0)

    def predict(of: SpeedUp, num_drafts: int) -> Prediction:
        more = 2.0 if num_drafts == 1 else 2.05
        ahead = (1.0, more)
        return Prediction(of.prediction.situation, ahead, ahead, 100.0, (0.0, 0.3))

    (cost,) = token_costs([one], predict, 3.6, 0.36)
    assert cost.plain == pytest.approx(10)
    # A second replica brings 2.5 % and costs 9 %.
    assert cost.num_drafts == 1
    assert cost.with_drafts == pytest.approx(11 / 2.2)
    assert cost.num_targets == 3
    assert cost.is_measured
    (free,) = token_costs([one], predict, 3.6, 0.0)
    assert free.num_drafts == 2
    assert free.with_drafts == pytest.approx(10 / 2.2 * 2.0 / 2.05)
    found = verdict([], [one], [], [], 1.1, [cost])
    assert found.text.endswith(
        "; a million tokens cost 5 instead of 10 at one stream, with 1 draft per target"
    )


def test_prompt_lookup_is_named_and_without_gamma() -> None:
    found = verdict([], [speed_up(0, 1, 1.6)], [], [], 1.1, what="prompt lookup")
    assert found.text == "use prompt lookup: 1.6x at one stream (predicted)"


def test_a_gain_that_draft_tokens_cannot_explain_is_noise() -> None:
    """1.3 times the speed with 1.02 tokens per round: the machine, not the draft."""
    noisy = replace(speed_up(0, 1, 1.0, 1.3), tokens_per_round=1.02)
    assert not given(noisy).is_worth_it
    assert given(replace(noisy, tokens_per_round=2.5)).is_worth_it
