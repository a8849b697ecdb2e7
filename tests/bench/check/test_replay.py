"""Rounds replayed along a text: against the formula, enumeration, and sampled rounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from outrider.sampling.formulas import mean_acceptance_length
from outrider_bench.check.replay import Text, replayed


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_a_constant_acceptance_gives_the_formula(alpha: float, gamma: int) -> None:
    rounds = replayed([[alpha] * 20_000], gamma)
    expected = mean_acceptance_length(alpha, gamma)
    assert rounds.tokens_per_round == pytest.approx(expected, rel=2e-3)
    assert rounds.alpha == pytest.approx(alpha)
    assert rounds.survival == pytest.approx([alpha ** (k + 1) for k in range(gamma)], abs=1e-6)


def test_bursts_give_fewer_tokens_than_their_mean_suggests() -> None:
    """γ cuts a run of accepted tokens, and the bonus tokens in it are not verified."""
    bursts, gamma = replayed([([1.0] * 10 + [0.0] * 10) * 500], 2), 2
    assert bursts.tokens_per_round < mean_acceptance_length(0.5, gamma) - 0.2
    assert bursts.alpha < 0.42


def enumerated(text: Text, gamma: int) -> tuple[float, float, float]:
    """Expected rounds, verified and accepted draft tokens, over all outcomes."""
    total = np.zeros(3)
    for outcome in itertools.product([0, 1], repeat=len(text)):
        prob = float(np.prod([p if a else 1 - p for p, a in zip(text, outcome, strict=True)]))
        total += prob * np.array(played(outcome, gamma))
    return tuple(total.tolist())


def played(outcome: tuple[int, ...], gamma: int) -> tuple[int, int, int]:
    """(rounds, verified, accepted), as the services would run them."""
    position, rounds, verified, accepted = 1, 0, 0, 0
    while position < len(outcome):
        rounds += 1
        for _ in range(min(gamma, len(outcome) - position - 1)):
            verified += 1
            accepted += outcome[position]
            position += 1
            if not outcome[position - 1]:
                break
        else:
            position += 1  # the bonus token
    return rounds, verified, accepted


@pytest.mark.parametrize("gamma", [1, 2, 4, 12])
def test_equals_an_enumeration_of_all_outcomes(gamma: int) -> None:
    text = [0.3, 0.9, 0.1, 0.5, 0.99, 0.7, 0.0, 0.4, 1.0, 0.6]
    num_rounds, num_verified, num_accepted = enumerated(text, gamma)
    rounds = replayed([text], gamma)
    assert rounds.num_rounds == pytest.approx(num_rounds)
    assert rounds.tokens_per_round == pytest.approx((len(text) - 1) / num_rounds)
    assert rounds.alpha == pytest.approx(num_accepted / num_verified)


def test_texts_are_independent() -> None:
    """Rounds and tokens of several texts add up, also of those too short for a draft token."""
    one, two = [0.2, 0.5, 0.8, 0.1], [0.9, 0.9, 0.3]
    both = replayed([one, two, [0.5], []], 2)
    apart = [replayed([text], 2) for text in (one, two)]
    assert both.num_rounds == pytest.approx(sum(r.num_rounds for r in apart))
    with pytest.raises(ValueError, match="two tokens"):
        replayed([[0.5], []], 2)
