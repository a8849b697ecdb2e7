"""The formulas of speculative decoding against simulation, and against each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from outrider.sampling.formulas import (
    acceptance_band,
    acceptance_from_length,
    coupled_acceptance_bound,
    mean_acceptance_length,
    speedup_hidden,
    speedup_sequential,
    total_variation,
)
from outrider.sampling.random import Purpose, token_gumbels
from outrider.sampling.verify import verify_equal

from .keys import stream_keys

_gammas = st.integers(0, 20)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.8, 5), (0.5, 1), (0.95, 16), (0.0, 4), (0.3, 0)])
def test_mean_acceptance_length_matches_simulation(alpha: float, gamma: int) -> None:
    """Independent acceptance, 200,000 rounds: mean within its error; false alarm 1e-6 each."""
    accepted = np.random.default_rng(gamma).random((200_000, gamma)) < alpha
    tokens = 1 + np.cumprod(accepted, axis=1).sum(axis=1)
    error = stats.norm.isf(5e-7) * tokens.std() / np.sqrt(len(tokens))
    assert abs(tokens.mean() - mean_acceptance_length(alpha, gamma)) <= error + 1e-12


@given(st.floats(0, 0.999), _gammas)
def test_mean_acceptance_length_is_the_geometric_sum(alpha: float, gamma: int) -> None:
    """1 + α + … + α^γ."""
    expected = sum(alpha**i for i in range(gamma + 1))
    assert mean_acceptance_length(alpha, gamma) == pytest.approx(expected, rel=1e-11)


def test_certain_acceptance() -> None:
    """At α = 1, and just below it, all γ tokens and the bonus."""
    assert mean_acceptance_length(1.0, 7) == 8
    assert mean_acceptance_length(1 - 1e-9, 7) == pytest.approx(8, rel=1e-6)


@given(st.floats(0, 1), st.integers(1, 16))
def test_acceptance_from_length_inverts(alpha: float, gamma: int) -> None:
    """α to τ and back."""
    tau = mean_acceptance_length(alpha, gamma)
    recovered = acceptance_from_length(tau, gamma)
    assert mean_acceptance_length(recovered, gamma) == pytest.approx(tau, abs=1e-6)
    assert recovered == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 0.0), (1.0, 0.0), (6.0, 1.0), (99.0, 1.0)])
def test_acceptance_from_length_at_the_ends(tau: float, expected: float) -> None:
    """Lengths that no α can give are clamped."""
    assert acceptance_from_length(tau, 5) == pytest.approx(expected, abs=1e-6)


def test_speedups_of_the_design() -> None:
    """α = 0.8, c = 0.1 gives 2.47 sequentially at best γ; the ceiling is 5."""
    sequential = max(speedup_sequential(0.8, gamma, 0.1) for gamma in range(20))
    hidden = max(speedup_hidden(0.8, gamma, 0.1) for gamma in range(20))
    assert sequential == pytest.approx(2.47, abs=0.02)
    assert sequential < hidden < 5


@given(st.floats(0, 1), _gammas, st.floats(0, 3))
def test_parallel_drafting_is_never_slower(alpha: float, gamma: int, cost_ratio: float) -> None:
    """Drafting in parallel is at least as fast as in turn; γ = 0 is plain decoding."""
    hidden = speedup_hidden(alpha, gamma, cost_ratio)
    assert hidden >= speedup_sequential(alpha, gamma, cost_ratio) - 1e-12
    assert speedup_sequential(alpha, 0, cost_ratio) == pytest.approx(1)


def test_total_variation() -> None:
    """Half the L1 distance: 0 for equal, 1 for disjoint, symmetric, 1 - Σ min."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    assert total_variation(p, p) == 0
    assert total_variation(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1
    assert total_variation(p, q) == total_variation(q, p)
    assert total_variation(p, q) == pytest.approx(1 - np.minimum(p, q).sum())


def test_coupled_acceptance_is_between_its_bound_and_the_optimum() -> None:
    """Shared Gumbel noise, 10 random pairs, 50,000 positions: (1-TV)/(1+TV) ≤ α ≤ 1-TV.

    Each side within 5 standard errors: false alarm below 1e-5 in all.
    """
    num, rng = 50_000, np.random.default_rng(1)
    noise = token_gumbels(stream_keys(1, Purpose.TARGET, np.arange(num)), np.arange(6))
    for _ in range(10):
        p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
        target = (np.log(p) + noise).argmax(-1)
        draft = (np.log(q) + noise).argmax(-1)
        alpha = float((target == draft).mean())
        error = 5 * np.sqrt(0.25 / num)
        tv = total_variation(p, q)
        assert coupled_acceptance_bound(tv) - error <= alpha <= 1 - tv + error
        judged = [
            verify_equal([int(d)], [int(t), 0]).num_accepted
            for d, t in zip(draft[:500], target[:500], strict=True)
        ]
        assert judged == (draft == target)[:500].astype(int).tolist()


@pytest.mark.parametrize(
    ("alpha", "band"), [(1.0, "excellent"), (0.7, "excellent"), (0.69, "good"), (0.5, "good")]
)
def test_bands(alpha: float, band: str) -> None:
    """Lower bounds of the bands."""
    assert acceptance_band(alpha) == band
    assert acceptance_band(0.49).startswith("poor")
