"""Probe schedule: while γ = 0, one round in N tries draft tokens.

Without draft tokens nothing is learned about the acceptance rate. N doubles from 32 to 512 as long
as probes do not pay.
"""

from __future__ import annotations

from dataclasses import dataclass

# Choice: a failed probe costs about one round, so probes cost 3 % of the time at first, then 0.2 %.
_FIRST_INTERVAL = 32
_MAX_INTERVAL = 512


@dataclass
class ProbeSchedule:
    """Probes of one generation, or of all generations of the orchestrator together."""

    interval: int = _FIRST_INTERVAL
    num_plain_rounds: int = 0

    def advance(self, num_rounds: int) -> bool:
        """Counts rounds without draft tokens; whether a probe is due."""
        self.num_plain_rounds += num_rounds
        return self.num_plain_rounds >= self.interval

    def probed(self, *, is_promising: bool) -> None:
        """A probe starts. `is_promising`: the one before had all its draft tokens accepted."""
        self.num_plain_rounds = 0
        if not is_promising:
            self.interval = min(2 * self.interval, _MAX_INTERVAL)

    def reset(self) -> None:
        """Draft tokens are used again."""
        self.num_plain_rounds, self.interval = 0, _FIRST_INTERVAL
