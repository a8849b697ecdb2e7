"""Results of the phases of `outrider bench overload`: latencies, goals, table, plot. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outrider_bench.loadtest.measures import Distribution, Latencies, tokens_per_s
from outrider_bench.loadtest.records import CUT, OK, Record

if TYPE_CHECKING:
    from rich.table import Table

    from outrider_bench.measuring.document import Goal
    from outrider_bench.measuring.plots import Line, Panel

_REFUSED = "RESOURCE_EXHAUSTED"
# A rejection within this time feels immediate; a round trip on a busy machine takes far less.
_IMMEDIATE_S = 0.1
_NUM_POINTS = 100


@dataclass
class PhaseResult:
    """Requests of one phase whose intended send time is after the settling time. Times in seconds.

    `accepted`: latencies of requests that ended OK. `refused_after`: time from the intended send to
    the rejection. `offered_per_s`: None in a closed loop. `errors`: counts of statuses other than
    OK and RESOURCE_EXHAUSTED. `deaths`: programs that ended. `num_left_open`: generations still
    open at the target after the phase.
    """

    name: str
    offered_per_s: float | None
    num_accepted: int
    num_refused: int
    errors: dict[str, int]
    requests_per_s: float
    tokens_per_s: float
    accepted: Latencies
    refused_after: Distribution | None
    num_refused_with_hint: int
    e2e_s: list[float]
    tpot_s: list[float]
    deaths: list[str] = field(default_factory=list)
    num_left_open: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        records: Iterable[Record],
        begin_s: float,
        end_s: float,
        offered_per_s: float | None = None,
    ) -> PhaseResult:
        """Counts tokens and requests in [begin_s, end_s).

        Latencies are of requests whose intended send time is in that window.
        """
        all_records = list(records)
        sent = [r for r in all_records if begin_s <= r.intended_s < end_s]
        accepted = [record for record in sent if record.is_ok]
        refused = [record for record in sent if record.status == _REFUSED]
        ended = [r.ended_s for r in all_records if r.is_ok and r.ended_s is not None]
        statuses = Counter(r.status for r in sent if r.status not in (OK, _REFUSED, CUT))
        return cls(
            name=name,
            offered_per_s=offered_per_s,
            num_accepted=len(accepted),
            num_refused=len(refused),
            errors=dict(statuses),
            requests_per_s=sum(begin_s <= at < end_s for at in ended) / (end_s - begin_s),
            tokens_per_s=tokens_per_s(all_records, begin_s, end_s),
            accepted=Latencies.of(accepted),
            refused_after=Distribution.of([r.e2e_s for r in refused if r.e2e_s is not None]),
            num_refused_with_hint=sum(r.retry_after_s is not None for r in refused),
            e2e_s=sorted(r.e2e_s for r in accepted if r.e2e_s is not None),
            tpot_s=sorted(r.tpot_s for r in accepted if r.tpot_s is not None),
        )


def goals(phases: Sequence[PhaseResult]) -> list[Goal]:
    """Goals of the overload test; medians over the repetitions."""
    from outrider_bench.measuring.document import Goal

    at = [phase for phase in phases if phase.name == "capacity"]
    over = [phase for phase in phases if phase.name == "overload"]

    def ratio(value: Callable[[PhaseResult], float | None]) -> float | None:
        below = _median(map(value, at))
        above = _median(map(value, over))
        return above / below if above is not None and below else None

    goals: list[Goal] = []
    for name in ("e2e", "tpot"):
        for percentile in (50, 99):
            got = ratio(_latency(name, percentile))
            text = f"{name} p{percentile} of accepted requests, over that at capacity"
            goals.append(Goal(text, 1.5, got, is_most=True))
    peak = max((phase.tokens_per_s for phase in at), default=0.0)
    least = min((phase.tokens_per_s for phase in over), default=None)
    share = least / peak if least is not None and peak else None
    goals.append(Goal("minimum tokens/s over the peak", 0.9, share))
    late = [c.refused_after.p99 for c in over if c.refused_after is not None]
    goals.append(
        Goal("seconds until a rejection, p99", _IMMEDIATE_S, max(late, default=None), is_most=True)
    )
    goals += _stability_goals(phases, over)
    return goals


def _stability_goals(phases: Sequence[PhaseResult], over: Sequence[PhaseResult]) -> list[Goal]:
    """Goals that nothing fails or leaks under overload."""
    from outrider_bench.measuring.document import Goal

    refused = sum(phase.num_refused for phase in over)
    hints = sum(phase.num_refused_with_hint for phase in over)
    failed = sum(sum(phase.errors.values()) for phase in phases)
    left = [phase.num_left_open for phase in phases if phase.num_left_open is not None]
    return [
        Goal("rejections with a retry hint", 1.0, hints / refused if refused else None),
        Goal("requests with other errors", 0, failed, is_most=True),
        Goal("programs that ended", 0, sum(len(c.deaths) for c in phases), is_most=True),
        Goal("generations left open at the target", 0, sum(left) if left else None, is_most=True),
    ]


def _latency(name: str, percentile: int) -> Callable[[PhaseResult], float | None]:
    def value(phase: PhaseResult) -> float | None:
        found: Distribution | None = getattr(phase.accepted, name)
        return None if found is None else found.percentiles[percentile]

    return value


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def panels(phases: Sequence[PhaseResult]) -> list[Panel]:
    """Cumulative latency distributions of accepted requests, over all repetitions."""
    from outrider_bench.measuring.plots import Line, Panel

    def lines(value: Callable[[PhaseResult], list[float]]) -> list[Line]:
        drawn = []
        for name in ("capacity", "overload"):
            values = sorted(v for phase in phases if phase.name == name for v in value(phase))
            if values:
                places = [
                    round(i * (len(values) - 1) / _NUM_POINTS) for i in range(_NUM_POINTS + 1)
                ]
                xs = [values[place] for place in places]
                ys = [100 * i / _NUM_POINTS for i in range(_NUM_POINTS + 1)]
                drawn.append(Line(name, xs, ys, has_marks=False))
        return drawn

    return [
        Panel("end-to-end latency, s", "% of accepted requests", lines(lambda phase: phase.e2e_s)),
        Panel(
            "time per output token, ms",
            "% of accepted requests",
            lines(lambda phase: [1e3 * v for v in phase.tpot_s]),
        ),
    ]


def table(phases: Sequence[PhaseResult]) -> Table:
    """Table with a row for each phase."""
    from outrider_bench.measuring import show

    columns = ("phase", "offered/s", "accepted", "rejected", "requests/s", "tokens/s")
    times = ("e2e p50", "p99", "TPOT p50 ms", "p99 ", "rejected p50 ms", "p99  ")
    shown = show.table("a system at capacity and under overload", (*columns, *times))
    for phase in phases:
        e2e, tpot, late = phase.accepted.e2e, phase.accepted.tpot, phase.refused_after
        shown.add_row(
            phase.name, show.number(phase.offered_per_s, 1),
            str(phase.num_accepted), str(phase.num_refused),
            show.number(phase.requests_per_s, 1), show.number(phase.tokens_per_s, 1),
            *_pair(e2e, 1.0, 2), *_pair(tpot, 1e3, 1), *_pair(late, 1e3, 1),
        )  # fmt: skip
    return shown


def _pair(found: Distribution | None, scale: float, digits: int) -> tuple[str, str]:
    """p50 and p99 as text; empty without values."""
    if found is None:
        return "", ""
    return f"{scale * found.p50:.{digits}f}", f"{scale * found.p99:.{digits}f}"
