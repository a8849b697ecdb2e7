"""Trials of a round: their expectations hold if verification is exact, for every method.

Each check has a false-alarm probability of 1e-6.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from orchestrator.audit.trials import acceptance_trials, emitted_positions
from outrider.sampling.params import Verification
from tests.orchestrator.audit.rounds import random_round

_FALSE_ALARM = 1e-6
_NUM_ROUNDS = 4_000
_METHODS = [Verification.REJECTION, Verification.BLOCK]


def _p_value(differences: np.ndarray) -> float:
    """Of a mean of 0, by the central limit theorem."""
    z = differences.mean() / (differences.std() / len(differences) ** 0.5)
    return float(2 * stats.norm.sf(abs(z)))


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("gamma", [1, 4])
def test_expectations_hold(method: Verification, gamma: int) -> None:
    """Acceptance given the draft token and before it, and the positions of emitted tokens."""
    rng = np.random.default_rng(gamma)
    rounds = [random_round(rng, method, gamma) for _ in range(_NUM_ROUNDS)]
    trials = [trial for each in rounds for trial in acceptance_trials(each, method)]
    given = np.array([trial.accepted - trial.prob for trial in trials])
    before = np.array([trial.accepted - trial.mean_prob for trial in trials])
    assert _p_value(given) > _FALSE_ALARM
    assert _p_value(before) > _FALSE_ALARM
    positions = [place for each in rounds for place in emitted_positions(each, method, rng)]
    assert stats.kstest(positions, "uniform").pvalue > _FALSE_ALARM


@pytest.mark.parametrize("method", _METHODS)
def test_a_draft_that_samples_otherwise_than_it_says(method: Verification) -> None:
    """Acceptance of the tokens is right, but the output is wrong: `identity` and `position`."""
    rng = np.random.default_rng(1)
    rounds = [random_round(rng, method, 2, is_draft_honest=False) for _ in range(2 * _NUM_ROUNDS)]
    trials = [trial for each in rounds for trial in acceptance_trials(each, method)]
    given = np.array([trial.accepted - trial.prob for trial in trials])
    before = np.array([trial.accepted - trial.mean_prob for trial in trials])
    assert _p_value(given) > _FALSE_ALARM
    assert _p_value(before) < _FALSE_ALARM
    positions = [place for each in rounds for place in emitted_positions(each, method, rng)]
    assert stats.kstest(positions, "uniform").pvalue < _FALSE_ALARM


def test_the_mean_probability_is_one_minus_the_total_variation() -> None:
    """Leviathan et al. 2023, Corollary 3.6: Σ min(target, draft)."""
    committed = random_round(np.random.default_rng(2), Verification.REJECTION, 1)
    (trial,) = acceptance_trials(committed, Verification.REJECTION)
    assert committed.proposal is not None
    assert committed.proposal.supports is not None
    draft_probs = committed.proposal.supports[0].probs
    target_probs = committed.result.support_probs[0]
    distance = 0.5 * (np.abs(target_probs - draft_probs).sum() + committed.result.tail_mass[0])
    assert trial.mean_prob == pytest.approx(1 - distance)
