"""Results of `outrider bench attacks`: phases, goals and table. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from outrider_bench.measuring.document import Goal

PHASES = ("before", "during", "after")


@dataclass
class Phase:
    """Measurements of one phase of one attack. Times in seconds, orchestrator memory in MiB.

    `gaps_s`: time between messages of the healthy stream. `first_token_s`: time to first token of
    new clients, which send one request after another. `num_refused`: new clients rejected with
    RESOURCE_EXHAUSTED. `failed`: other errors of new clients, by status.
    """

    attack: str
    name: str
    gaps_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    num_refused: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    most_memory_mib: float = 0.0
    # Responses to the attackers, by status.
    attackers: dict[str, int] = field(default_factory=dict)
    # Error that ended the healthy stream in this phase; None: it did not end.
    ended: str | None = None

    def result(self) -> dict[str, Any]:
        """Entry of the JSON document, with distributions instead of samples."""
        from outrider_bench.loadtest.measures import Distribution

        entry = asdict(self) | {"failed": dict(self.failed)}
        for name in ("gaps_s", "first_token_s"):
            values = entry.pop(name)
            found = Distribution.of(values)
            entry[name] = None if found is None else {**asdict(found), "most": max(values)}
        return entry


def goals(phases: list[Phase]) -> list[Goal]:
    """Goals: the healthy stream never ends, new clients do not fail.

    During long prompts the p99 gap between messages at most doubles.
    """
    from outrider_bench.measuring.document import Goal

    by_name = {(phase.attack, phase.name): phase for phase in phases}
    goals = []
    for attack in dict.fromkeys(phase.attack for phase in phases):
        ended = sum(by_name[attack, name].ended is not None for name in PHASES)
        goals.append(Goal(f"{attack}: healthy streams that ended", 0, ended, is_most=True))
        failed = sum((by_name[attack, name].failed for name in PHASES), Counter[str]())
        if (
            attack == "fail-over"
        ):  # the documented status while Redis is down: a new generation needs Redis
            del failed["UNAVAILABLE"]
        goals.append(Goal(f"{attack}: new clients that failed", 0, failed.total(), is_most=True))
    if ("long-prompts", "before") in by_name:
        before, during = (_p99(by_name["long-prompts", name]) for name in ("before", "during"))
        ratio = during / before if before and during else None
        goals.append(Goal("long-prompts: p99 during over before", 2.0, ratio, is_most=True))
    return goals


def _p99(phase: Phase) -> float | None:
    from outrider_bench.loadtest.measures import Distribution

    found = Distribution.of(phase.gaps_s)
    return None if found is None else found.p99


def table(phases: list[Phase]) -> Table:
    """Table with a row for each phase."""
    from outrider_bench.loadtest.measures import Distribution
    from outrider_bench.measuring import show

    columns = ("attack", "phase", "messages", "gap p50 ms", "p99", "max", "new clients",
               "TTFT p50 s", "max ", "rejected", "failed", "MiB", "attackers")  # fmt: skip
    shown = show.table("healthy stream, new clients, orchestrator memory", columns)
    for phase in phases:
        gaps, firsts = Distribution.of(phase.gaps_s), Distribution.of(phase.first_token_s)
        shown.add_row(
            phase.attack, phase.name, str(len(phase.gaps_s)),
            show.number(1e3 * gaps.p50 if gaps else None, 0),
            show.number(1e3 * gaps.p99 if gaps else None, 0),
            show.number(1e3 * max(phase.gaps_s) if gaps else None, 0),
            str(len(phase.first_token_s)),
            show.number(firsts.p50 if firsts else None),
            show.number(max(phase.first_token_s) if firsts else None),
            str(phase.num_refused), _counts(phase.failed),
            show.number(phase.most_memory_mib, 0), _counts(phase.attackers),
        )  # fmt: skip
    return shown


def _counts(statuses: Mapping[str, int]) -> str:
    return " ".join(f"{name} {num}" for name, num in statuses.items())
