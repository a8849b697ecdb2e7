"""What may go wrong with a system, and a seeded schedule of it.

Pure. Knows no process and no connection: `outrider_bench.chaos.inject` carries it out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from outrider.errors import ConfigError


class Tier(StrEnum):
    DRAFT = "draft"
    TARGET = "target"
    ORCHESTRATOR = "orchestrator"
    REDIS = "redis"


class Kind(StrEnum):
    """The first three befall a process, the others every connection of a link."""

    # SIGKILL; started again after the fault's duration.
    KILL = "kill"
    # SIGSTOP, then SIGCONT: it is there, and says nothing.
    FREEZE = "freeze"
    # SIGTERM; started again when it has ended by itself.
    STOP = "stop"
    # Everything takes longer, both ways.
    SLOW = "slow"
    # Nothing arrives; then all of it does, late.
    HOLD = "hold"
    # Nothing arrives; then the connections break.
    DROP = "drop"
    # One end is told that no more will come; the other goes on speaking to nobody.
    HALF_CLOSE = "half-close"
    # The connections break (RST); new ones are possible at once.
    RESET = "reset"
    # They break, and new ones are refused.
    CUT = "cut"


PROCESS_KINDS = frozenset({Kind.KILL, Kind.FREEZE, Kind.STOP})
# Redis at SIGTERM is Redis at SIGKILL: it has nothing to finish.
FAULTS: tuple[str, ...] = tuple(
    f"{tier}-{kind}" for tier in Tier for kind in Kind if (tier, kind) != (Tier.REDIS, Kind.STOP)
)
# One of each sort: what a run of some seconds can hold.
QUICK_FAULTS: tuple[str, ...] = (
    "draft-kill", "draft-freeze", "draft-hold", "draft-reset",
    "target-kill", "target-freeze", "target-drop", "target-half-close",
    "orchestrator-kill", "orchestrator-reset", "redis-kill", "redis-freeze", "redis-cut",
)  # fmt: skip

# Least and most seconds. A frozen or silent replica is to be noticed within 3 s: some are silent
# for less, some for more.
_DURATIONS_S: dict[Kind, tuple[float, float]] = {
    Kind.KILL: (0.1, 1.5),
    Kind.FREEZE: (0.5, 5.0),
    Kind.STOP: (0.0, 0.5),
    Kind.SLOW: (1.0, 4.0),
    Kind.HOLD: (0.5, 5.0),
    Kind.DROP: (0.5, 5.0),
    Kind.HALF_CLOSE: (0.1, 1.0),
    Kind.RESET: (0.0, 0.1),
    Kind.CUT: (0.3, 2.0),
}


@dataclass(frozen=True)
class Fault:
    """`at_s` from the schedule's start. `replica` of the tier; `link`: the orchestrator whose link.

    `link` means nothing for a process, nor for an orchestrator, whose links are its callers'.
    """

    at_s: float
    tier: Tier
    kind: Kind
    replica: int
    link: int
    duration_s: float

    @property
    def name(self) -> str:
        """Its sort: `draft-kill`."""
        return f"{self.tier}-{self.kind}"

    @property
    def place(self) -> str:
        """For people: `target 1`, `orchestrator 0 to target 1`."""
        there = self.tier.value if self.tier is Tier.REDIS else f"{self.tier} {self.replica}"
        if self.kind in PROCESS_KINDS:
            return there
        if self.tier is Tier.ORCHESTRATOR:
            return f"callers to {there}"
        return f"orchestrator {self.link} to {there}"


def parse_faults(text: str) -> tuple[str, ...]:
    """draft-kill,redis-freeze; a tier or a kind alone means all of its own. Raises ConfigError."""
    chosen: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = [name for name in FAULTS if part in (name, *name.split("-", 1))]
        if not found:
            raise ConfigError(f"--faults: {part!r} is none of {', '.join(FAULTS)}")
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
    """Without end: each of the names once, then once more in another order, and so on.

    `gap_s` is the mean time from one fault's beginning to the next one's.
    """
    generator = random.Random(f"outrider faults {seed}")
    at_s = 0.0
    while names:
        for name in generator.sample(names, len(names)):
            tier, _, kind = name.partition("-")
            at_s += generator.uniform(0.5, 1.5) * gap_s
            least_s, most_s = _DURATIONS_S[Kind(kind)]
            sizes = {Tier.REDIS: 1, Tier.ORCHESTRATOR: num_orchestrators}
            yield Fault(
                at_s=at_s,
                tier=Tier(tier),
                kind=Kind(kind),
                replica=generator.randrange(sizes.get(Tier(tier), num_replicas)),
                link=generator.randrange(num_orchestrators),
                duration_s=generator.uniform(least_s, min(most_s, longest_s)),
            )
