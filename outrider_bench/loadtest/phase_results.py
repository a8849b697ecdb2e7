"""Results of a load test: phases, and probed rates of a search. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from outrider_bench.loadtest.records import Record


@dataclass(frozen=True)
class Passes:
    """Counters of the target replicas, summed: passes, rows and tokens so far."""

    num_steps: int
    num_rows: int
    num_tokens: int

    def since(self, before: Passes) -> Passes:
        """Difference to earlier counters."""
        return Passes(
            self.num_steps - before.num_steps,
            self.num_rows - before.num_rows,
            self.num_tokens - before.num_tokens,
        )


@dataclass
class PhaseResult:
    """Result of one phase. `rate`: intended requests per second; None: no rate.

    `passes`: what the target replicas ran in it; None if their counters were not read.
    """

    variant: str
    repetition: int
    records: list[Record]
    rate: float | None = None
    duration_s: float = 0.0
    passes: Passes | None = None


@dataclass(frozen=True)
class Probe:
    """A probed rate of a search and its result."""

    variant: str
    rate: float
    attained: float
    has_passed: bool
    result: PhaseResult
