"""What theory says to expect: acceptance, tokens per round, speed-up. Pure arithmetic.

α: chance that one more draft token is accepted, taken as independent of the position.
τ: mean acceptance length, tokens per round (recovered or bonus token included).
c: time of one draft step over the time of one target pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads these formulas, and loads nothing heavy for it
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


def total_variation(target_probs: Floats, draft_probs: Floats) -> float:
    """1 - TV is the acceptance of rejection verification (Leviathan et al. 2023, Corollary 3.6)."""
    return float(0.5 * abs(target_probs - draft_probs).sum())


def coupled_acceptance_bound(total_variation: float) -> float:
    """Gumbel coupling accepts at least (1 - TV) / (1 + TV) (Daliri et al. 2024, Theorem 1)."""
    return (1 - total_variation) / (1 + total_variation)


def mean_acceptance_length(alpha: float, gamma: int) -> float:
    """τ = (1 - α^(γ+1)) / (1 - α) (Leviathan et al. 2023, equation 1)."""
    if alpha >= 1.0:
        return gamma + 1.0
    return float((1 - alpha ** (gamma + 1)) / (1 - alpha))


def speedup_sequential(alpha: float, gamma: int, cost_ratio: float) -> float:
    """Draft and verification in turn (Leviathan et al. 2023, Theorem 3.8)."""
    return mean_acceptance_length(alpha, gamma) / (gamma * cost_ratio + 1)


def speedup_hidden(alpha: float, gamma: int, cost_ratio: float) -> float:
    """Drafting entirely behind verification."""
    return mean_acceptance_length(alpha, gamma) / max(1.0, gamma * cost_ratio)


def acceptance_from_length(tau: float, gamma: int) -> float:
    """The α at which `mean_acceptance_length(α, γ)` is `tau`, by bisection; in [0, 1]."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if mean_acceptance_length(middle, gamma) < tau:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def acceptance_band(alpha: float) -> str:
    """The field's bands."""
    if alpha >= 0.7:
        return "excellent"
    return "good" if alpha >= 0.5 else "poor: look for another draft"
