"""Cost per million tokens with and without a draft tier. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outrider_bench.check.prediction import Prediction
from outrider_bench.check.results import SpeedUp

# Draft replicas for one target that are tried.
_NUM_DRAFTS = (1, 2, 3, 4, 8)
_SECONDS_PER_HOUR = 3600
_MILLION = 1_000_000


@dataclass(frozen=True)
class TokenCost:
    """Cost per million tokens of one target and its draft replicas, kept busy by these streams.

    `num_drafts`: replicas that a target wants: the number with the lowest cost. `num_targets`:
    targets that one draft replica has time for. `is_measured`: from measured speeds, otherwise from
    predicted ones; more than one draft replica is always predicted.
    """

    temperature: float
    num_streams: int
    plain: float
    with_drafts: float
    num_drafts: int
    num_targets: int
    is_measured: bool


def token_costs(
    speed_ups: Sequence[SpeedUp],
    predict: Callable[[SpeedUp, int], Prediction],
    target_per_hour: float,
    draft_per_hour: float,
) -> list[TokenCost]:
    """`predict(speed_up, num_drafts)`: the same prediction with more draft replicas."""
    return [_token_cost(one, predict, target_per_hour, draft_per_hour) for one in speed_ups]


def _token_cost(
    speed_up: SpeedUp,
    predict: Callable[[SpeedUp, int], Prediction],
    target_per_hour: float,
    draft_per_hour: float,
) -> TokenCost:
    plain_rate = speed_up.plain_tokens_per_s or speed_up.prediction.plain_tokens_per_s
    by_number = {num: predict(speed_up, num) for num in _NUM_DRAFTS}
    alone = by_number[1]

    def cost(num: int) -> float:
        # A measured speed-up is of one draft replica; the prediction says what more would bring.
        gain = speed_up.value * by_number[num].speed_up / alone.speed_up
        return _per_million(target_per_hour + num * draft_per_hour, plain_rate * gain)

    num_drafts = min(_NUM_DRAFTS, key=lambda num: (cost(num), num))
    share = alone.draft_share
    return TokenCost(
        temperature=speed_up.temperature,
        num_streams=speed_up.num_streams,
        plain=_per_million(target_per_hour, plain_rate),
        with_drafts=cost(num_drafts),
        num_drafts=num_drafts,
        num_targets=max(1, int(1 / share)) if share > 0 else 1,
        is_measured=speed_up.measured is not None,
    )


def _per_million(per_hour: float, tokens_per_s: float) -> float:
    return per_hour / _SECONDS_PER_HOUR / tokens_per_s * _MILLION
