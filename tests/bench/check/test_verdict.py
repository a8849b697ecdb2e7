"""The verdict: one line, worth it or not, and why."""

from __future__ import annotations

from outrider.engine.loading.model_shape import ModelShape
from outrider_bench.check.inspection import PairInspection
from outrider_bench.check.prediction import Prediction, Situation
from outrider_bench.check.results import Acceptance, PassCost, SpeedUp
from outrider_bench.check.verdict import Verdict, verdict

SHAPE = ModelShape("m", "llama", "float32", 100, 100, 0)


def inspection(*refused: str) -> PairInspection:
    return PairInspection(SHAPE, SHAPE, None, 10.0, refused, ())


def speed_up(
    temperature: float, num: int, predicted: float, measured: float | None = None
) -> SpeedUp:
    ahead = (1.0, 1.0, 1.0, max(1.0, predicted))
    prediction = Prediction(Situation(num), ahead, ahead)
    return SpeedUp(temperature, num, prediction, measured)


def given(*speed_ups: SpeedUp, refused: tuple[str, ...] = ()) -> Verdict:
    alpha = Acceptance("", 0, 100, 0.31, 0.3, "poor", 3, (0.3,), 1.4, 1.4)
    costs = [PassCost(1, 0.020, 0.005)]
    return verdict(inspection(*refused), speed_ups, [alpha], costs, 1.1)


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
