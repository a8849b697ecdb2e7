"""Types of faults, and a seeded schedule of them. Pure: `inject` carries the faults out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from outrider.errors import ConfigError


class Tier(StrEnum):
    """Part of the system that a fault affects."""

    DRAFT = "draft"
    TARGET = "target"
    ORCHESTRATOR = "orchestrator"
    REDIS = "redis"


class FaultKind(StrEnum):
    """Kind of fault. The first three affect a process, the others every connection of a link."""

    # SIGKILL; restarted after the fault's duration.
    KILL = "kill"
    # SIGSTOP, then SIGCONT: the process lives but sends nothing.
    FREEZE = "freeze"
    # SIGTERM; restarted after it has exited.
    STOP = "stop"
    # Adds latency in both directions.
    SLOW = "slow"
    # Data is delayed, then delivered.
    HOLD = "hold"
    # Data is delayed, then the connections break.
    DROP = "drop"
    # One end receives an end of stream; what the other sends is dropped.
    HALF_CLOSE = "half-close"
    # The connections break (RST); new ones are accepted at once.
    RESET = "reset"
    # The connections break and new ones are refused.
    CUT = "cut"


PROCESS_KINDS = frozenset({FaultKind.KILL, FaultKind.FREEZE, FaultKind.STOP})
# All faults. Redis has no stop: it has nothing to drain, so SIGTERM equals SIGKILL.
FAULTS: tuple[str, ...] = tuple(
    f"{tier}-{kind}"
    for tier in Tier
    for kind in FaultKind
    if (tier, kind) != (Tier.REDIS, FaultKind.STOP)
)
# Selection for a run of a few seconds.
QUICK_FAULTS: tuple[str, ...] = (
    "draft-kill", "draft-freeze", "draft-hold", "draft-reset",
    "target-kill", "target-freeze", "target-drop", "target-half-close",
    "orchestrator-kill", "orchestrator-reset", "redis-kill", "redis-freeze", "redis-cut",
)  # fmt: skip

# Shortest and longest duration of each kind, in seconds. A frozen or silent replica must be
# detected within 3 s: some faults are shorter, some longer.
_DURATIONS_S: dict[FaultKind, tuple[float, float]] = {
    FaultKind.KILL: (0.1, 1.5),
    FaultKind.FREEZE: (0.5, 5.0),
    FaultKind.STOP: (0.0, 0.5),
    FaultKind.SLOW: (1.0, 4.0),
    FaultKind.HOLD: (0.5, 5.0),
    FaultKind.DROP: (0.5, 5.0),
    FaultKind.HALF_CLOSE: (0.1, 1.0),
    FaultKind.RESET: (0.0, 0.1),
    FaultKind.CUT: (0.3, 2.0),
}


@dataclass(frozen=True)
class Fault:
    """One planned fault.

    `at_s`: seconds since the start of the schedule. `replica`: index in the tier. `link`: index of
    the orchestrator whose link is affected; unused for processes and for orchestrators, whose links
    are their clients'.
    """

    at_s: float
    tier: Tier
    kind: FaultKind
    replica: int
    link: int
    duration_s: float

    @property
    def name(self) -> str:
        """Type of the fault, such as `draft-kill`."""
        return f"{self.tier}-{self.kind}"

    @property
    def place(self) -> str:
        """Readable place: `target 1`, `orchestrator 0 to target 1`."""
        there = self.tier.value if self.tier is Tier.REDIS else f"{self.tier} {self.replica}"
        if self.kind in PROCESS_KINDS:
            return there
        if self.tier is Tier.ORCHESTRATOR:
            return f"clients to {there}"
        return f"orchestrator {self.link} to {there}"


def parse_faults(text: str) -> tuple[str, ...]:
    """Parses draft-kill,redis-freeze. A tier or kind alone selects all of its faults.

    Raises ConfigError.
    """
    chosen: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = [name for name in FAULTS if part in (name, *name.split("-", 1))]
        if not found:
            raise ConfigError(f"--faults: {part!r} is unknown; allowed: {', '.join(FAULTS)}")
        chosen += [name for name in found if name not in chosen]
    return tuple(chosen)


def schedule(
    seed: int,
    names: Sequence[str],
    *,
    num_replicas: int,
    num_orchestrators: int,
    gap_s: float,
    longest_s: float = 5.0,
) -> Iterator[Fault]:
    """Endless schedule: each of the names once, in random order, then again in another order.

    `gap_s`: mean time between the starts of two faults. `longest_s`: limit of every duration.
    """
    generator = random.Random(f"outrider faults {seed}")
    at_s = 0.0
    while names:
        for name in generator.sample(names, len(names)):
            tier, _, kind = name.partition("-")
            at_s += generator.uniform(0.5, 1.5) * gap_s
            least_s, most_s = _DURATIONS_S[FaultKind(kind)]
            sizes = {Tier.REDIS: 1, Tier.ORCHESTRATOR: num_orchestrators}
            yield Fault(
                at_s=at_s,
                tier=Tier(tier),
                kind=FaultKind(kind),
                replica=generator.randrange(sizes.get(Tier(tier), num_replicas)),
                link=generator.randrange(num_orchestrators),
                duration_s=generator.uniform(least_s, min(most_s, longest_s)),
            )
