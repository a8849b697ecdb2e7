"""How long a session waits for a proposal that is not here yet: as long as waiting is worth it.

A round without draft tokens gives one token in T; waiting w for a proposal gives 1 + g tokens in
w + T, with g the tokens it gets accepted. Waiting pays while w < g * T. Pure.
"""

from __future__ import annotations

_SMOOTHING = 0.3
# With nothing gained of late, a little patience is left, so that a recovered draft is noticed.
_LEAST_GAIN = 0.25


class Patience:
    """Of one generation. `fixed_s` overrides the estimate."""

    def __init__(self, gamma: int, fixed_s: float | None = None) -> None:
        self._fixed_s = fixed_s
        self._gain = gamma / 2
        self._round_s: float | None = None

    def saw_round(self, duration_s: float) -> None:
        """A target round trip; not one that ran a prompt, which says nothing of the next."""
        last = duration_s if self._round_s is None else self._round_s
        self._round_s = last + _SMOOTHING * (duration_s - last)

    def saw_proposal(self, num_accepted: int) -> None:
        """A proposal was verified; 0 also for one that did not come in time."""
        self._gain += _SMOOTHING * (num_accepted - self._gain)

    @property
    def wait_s(self) -> float:
        """0 before the first round was seen."""
        if self._fixed_s is not None:
            return self._fixed_s
        return max(self._gain, _LEAST_GAIN) * (self._round_s or 0.0)
