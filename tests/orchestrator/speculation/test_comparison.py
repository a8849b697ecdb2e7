"""The comparison of two draft revisions: its false decisions, and when it decides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator.speculation.comparison import FALSE_DECISION_RATE, difference_interval
from outrider.draft_rollout import AcceptanceSums

Rates = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Rates]

_MARGIN = 0.03
_NUM_RUNS = 200
_NUM_GENERATIONS = 3_000
# The defaults of the settings.
_SHARE = 0.1
_MIN_GENERATIONS = 20


def _spread(rng: np.random.Generator, num: int) -> Rates:
    return rng.beta(7, 3, num)


def _short_outputs(rng: np.random.Generator, num: int) -> Rates:
    return rng.binomial(8, rng.beta(6, 4, num)) / 8


def _rarely_bad(rng: np.random.Generator, num: int) -> Rates:
    return np.where(rng.random(num) < 0.05, 0.2, 0.95)


_KINDS = [_spread, _short_outputs, _rarely_bad]


def _decisions(canary: Draw, current: Draw, seed: int) -> tuple[int, int, list[int]]:
    """Promotions, roll-backs, and the canary's generations until then, looking at each one."""
    rng = np.random.default_rng(seed)
    num_promoted = num_rolled_back = 0
    sizes: list[int] = []
    for _ in range(_NUM_RUNS):
        is_canary = rng.random(_NUM_GENERATIONS) < _SHARE
        rates = np.where(is_canary, canary(rng, len(is_canary)), current(rng, len(is_canary)))
        sums = [AcceptanceSums(), AcceptanceSums()]
        for arm, rate in zip(is_canary.tolist(), rates.tolist(), strict=True):
            sums[arm] = sums[arm].plus(rate)
            if not arm or min(sums[0].num, sums[1].num) < _MIN_GENERATIONS:
                continue
            low, high = difference_interval(sums[1], sums[0])
            if high < 0 or low > -_MARGIN:
                num_rolled_back += high < 0
                num_promoted += high >= 0
                sizes.append(sums[1].num)
                break
    return num_promoted, num_rolled_back, sizes


# With a rate of 1 % more than 9 of 200 runs are wrong with a probability of 1e-4.
_MAX_WRONG = 9


@pytest.mark.parametrize("draw", _KINDS)
def test_an_equal_draft_is_rarely_rolled_back(draw: Draw) -> None:
    assert FALSE_DECISION_RATE == 0.01
    _, num_rolled_back, _ = _decisions(draw, draw, seed=1)
    assert num_rolled_back <= _MAX_WRONG


@pytest.mark.parametrize("draw", _KINDS)
def test_a_draft_worse_by_the_margin_is_rarely_promoted(draw: Draw) -> None:
    num_promoted, _, _ = _decisions(lambda rng, num: draw(rng, num) - _MARGIN, draw, seed=2)
    assert num_promoted <= _MAX_WRONG


def test_clear_differences_are_decided_within_tens_of_generations() -> None:
    """Probability of a failure far below 1e-6: the differences are five standard deviations."""
    for difference in (-0.5, 0.2):
        num_promoted, num_rolled_back, sizes = _decisions(
            lambda rng, num, by=difference: np.clip(_spread(rng, num) + by, 0, 1), _spread, seed=3
        )
        assert (num_promoted, num_rolled_back) == ((_NUM_RUNS, 0), (0, _NUM_RUNS))[difference < 0]
        assert np.median(sizes) < 2 * _MIN_GENERATIONS


def test_nothing_is_known_before_two_generations() -> None:
    one = AcceptanceSums().plus(0.5)
    assert difference_interval(one, one.plus(0.5)) == (-1.0, 1.0)
