"""Formulas for expected acceptance, tokens per round and speed-up. Pure arithmetic.

α: probability that a draft token is accepted if those before it were; the same at every position.
τ: mean acceptance length, in tokens per round (recovered or bonus token included).
c (`cost_ratio`): time of a draft step divided by the time of a target pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this file and must start fast
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


def total_variation(target_probs: Floats, draft_probs: Floats) -> float:
    """TV of two distributions [vocab]. Rejection verification accepts with probability 1 - TV.

    Leviathan et al. 2023, Corollary 3.6.
    """
    return float(0.5 * abs(target_probs - draft_probs).sum())


def coupled_acceptance_bound(total_variation: float) -> float:
    """Least acceptance of Gumbel coupling: (1 - TV) / (1 + TV) (Daliri et al. 2024, Theorem 1)."""
    return (1 - total_variation) / (1 + total_variation)


def mean_acceptance_length(alpha: float, gamma: int) -> float:
    """τ = (1 - α^(γ+1)) / (1 - α) (Leviathan et al. 2023, equation 1)."""
    if alpha >= 1.0:
        return gamma + 1.0
    return float((1 - alpha ** (gamma + 1)) / (1 - alpha))


def speedup_sequential(alpha: float, gamma: int, cost_ratio: float) -> float:
    """Speed-up of drafting and verifying in turn (Leviathan et al. 2023, Theorem 3.8)."""
    return mean_acceptance_length(alpha, gamma) / (gamma * cost_ratio + 1)


def speedup_hidden(alpha: float, gamma: int, cost_ratio: float) -> float:
    """Speed-up of drafting in parallel with verification."""
    return mean_acceptance_length(alpha, gamma) / max(1.0, gamma * cost_ratio)


def acceptance_from_length(tau: float, gamma: int) -> float:
    """α in [0, 1] with `mean_acceptance_length(α, γ)` = `tau`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if mean_acceptance_length(middle, gamma) < tau:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def acceptance_band(alpha: float) -> str:
    """Name of the usual band of acceptance rates."""
    if alpha >= 0.7:
        return "excellent"
    return "good" if alpha >= 0.5 else "poor: look for another draft"
