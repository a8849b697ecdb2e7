"""What is kept of a load test: stretches of load, and rates that were tried. Plain data.

Knows neither who made the load nor what it meant.
"""

from __future__ import annotations

from dataclasses import dataclass

from outrider_bench.loadtest.records import Record


@dataclass(frozen=True)
class Passes:
    """Counters of the target replicas, in sum: passes, rows and tokens run so far."""

    num_steps: int
    num_rows: int
    num_tokens: int

    def since(self, before: Passes) -> Passes:
        return Passes(
            self.num_steps - before.num_steps,
            self.num_rows - before.num_rows,
            self.num_tokens - before.num_tokens,
        )


@dataclass
class Stretch:
    """One phase as it was kept. `rate`: requests per second meant, None without one.

    `passes`: what the target replicas ran in it, None where nobody was asked.
    """

    variant: str
    repetition: int
    records: list[Record]
    rate: float | None = None
    duration_s: float = 0.0
    passes: Passes | None = None


@dataclass(frozen=True)
class Probe:
    """A rate that was tried in a search, and what came of it."""

    variant: str
    rate: float
    attained: float
    has_passed: bool
    stretch: Stretch
