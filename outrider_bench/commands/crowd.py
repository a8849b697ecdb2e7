"""What the callers of one phase of `outrider bench overload` lived through, and the goals. Pure."""

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
# "At once" for a person; a round trip on a busy machine is far below it.
_AT_ONCE_S = 0.1
_NUM_POINTS = 100


@dataclass
class Crowd:
    """Of the requests that were meant to be sent after the settling time. Times in seconds.

    `offered_per_s`: None in a closed loop. `refused_after`: from the intended send to the refusal.
    `errors`: statuses that are neither OK nor a refusal.
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
    ) -> Crowd:
        """Tokens and requests are counted in [begin_s, end_s); latencies of who asked in it."""
        everything = list(records)
        asked = [r for r in everything if begin_s <= r.intended_s < end_s]
        accepted = [record for record in asked if record.is_ok]
        refused = [record for record in asked if record.status == _REFUSED]
        ended = [r.ended_s for r in everything if r.is_ok and r.ended_s is not None]
        statuses = Counter(r.status for r in asked if r.status not in (OK, _REFUSED, CUT))
        return cls(
            name=name,
            offered_per_s=offered_per_s,
            num_accepted=len(accepted),
            num_refused=len(refused),
            errors=dict(statuses),
            requests_per_s=sum(begin_s <= at < end_s for at in ended) / (end_s - begin_s),
            tokens_per_s=tokens_per_s(everything, begin_s, end_s),
            accepted=Latencies.of(accepted),
            refused_after=Distribution.of([r.e2e_s for r in refused if r.e2e_s is not None]),
            num_refused_with_hint=sum(r.retry_after_s is not None for r in refused),
            e2e_s=sorted(r.e2e_s for r in accepted if r.e2e_s is not None),
            tpot_s=sorted(r.tpot_s for r in accepted if r.tpot_s is not None),
        )


def goals(crowds: Sequence[Crowd]) -> list[Goal]:
    """Of issue 4; medians over the repetitions."""
    from outrider_bench.measuring.document import Goal

    at = [crowd for crowd in crowds if crowd.name == "capacity"]
    over = [crowd for crowd in crowds if crowd.name == "overload"]

    def ratio(value: Callable[[Crowd], float | None]) -> float | None:
        below = _median(map(value, at))
        above = _median(map(value, over))
        return above / below if above is not None and below else None

    told: list[Goal] = []
    for name in ("e2e", "tpot"):
        for percentile in (50, 99):
            got = ratio(_latency(name, percentile))
            text = f"{name} p{percentile} of the accepted, over that at capacity"
            told.append(Goal(text, 1.5, got, is_most=True))
    peak = max((crowd.tokens_per_s for crowd in at), default=0.0)
    least = min((crowd.tokens_per_s for crowd in over), default=None)
    share = least / peak if least is not None and peak else None
    told.append(Goal("tokens/s of the accepted over the peak, at its least", 0.9, share))
    late = [c.refused_after.p99 for c in over if c.refused_after is not None]
    told.append(
        Goal("seconds until a refusal, p99", _AT_ONCE_S, max(late, default=None), is_most=True)
    )
    told += _whole(crowds, over)
    return told


def _whole(crowds: Sequence[Crowd], over: Sequence[Crowd]) -> list[Goal]:
    """That nothing broke."""
    from outrider_bench.measuring.document import Goal

    refused = sum(crowd.num_refused for crowd in over)
    hints = sum(crowd.num_refused_with_hint for crowd in over)
    failed = sum(sum(crowd.errors.values()) for crowd in crowds)
    left = [crowd.num_left_open for crowd in crowds if crowd.num_left_open is not None]
    return [
        Goal("refusals that say when to come again", 1.0, hints / refused if refused else None),
        Goal("requests that failed otherwise", 0, failed, is_most=True),
        Goal("programs that ended", 0, sum(len(c.deaths) for c in crowds), is_most=True),
        Goal("generations left open at the target", 0, sum(left) if left else None, is_most=True),
    ]


def _latency(name: str, percentile: int) -> Callable[[Crowd], float | None]:
    def value(crowd: Crowd) -> float | None:
        found: Distribution | None = getattr(crowd.accepted, name)
        return None if found is None else found.percentiles[percentile]

    return value


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def panels(crowds: Sequence[Crowd]) -> list[Panel]:
    """Shares of the accepted by latency; of all repetitions together."""
    from outrider_bench.measuring.plots import Line, Panel

    def lines(value: Callable[[Crowd], list[float]]) -> list[Line]:
        drawn = []
        for name in ("capacity", "overload"):
            values = sorted(v for crowd in crowds if crowd.name == name for v in value(crowd))
            if values:
                places = [
                    round(i * (len(values) - 1) / _NUM_POINTS) for i in range(_NUM_POINTS + 1)
                ]
                xs = [values[place] for place in places]
                ys = [100 * i / _NUM_POINTS for i in range(_NUM_POINTS + 1)]
                drawn.append(Line(name, xs, ys, has_marks=False))
        return drawn

    return [
        Panel("end-to-end, s", "% of the accepted", lines(lambda crowd: crowd.e2e_s)),
        Panel(
            "per output token, ms",
            "% of the accepted",
            lines(lambda crowd: [1e3 * v for v in crowd.tpot_s]),
        ),
    ]


def table(crowds: Sequence[Crowd]) -> Table:
    from outrider_bench.measuring import show

    columns = ("", "offered/s", "accepted", "refused", "requests/s", "tokens/s")
    times = ("e2e p50", "p99", "TPOT p50 ms", "p99 ", "refused p50 ms", "p99  ")
    shown = show.table("a system and five times as many callers", (*columns, *times))
    for crowd in crowds:
        e2e, tpot, late = crowd.accepted.e2e, crowd.accepted.tpot, crowd.refused_after
        shown.add_row(
            crowd.name, show.number(crowd.offered_per_s, 1),
            str(crowd.num_accepted), str(crowd.num_refused),
            show.number(crowd.requests_per_s, 1), show.number(crowd.tokens_per_s, 1),
            *_pair(e2e, 1.0, 2), *_pair(tpot, 1e3, 1), *_pair(late, 1e3, 1),
        )  # fmt: skip
    return shown


def _pair(found: Distribution | None, scale: float, digits: int) -> tuple[str, str]:
    """p50 and p99; nothing for what nobody had."""
    if found is None:
        return "", ""
    return f"{scale * found.p50:.{digits}f}", f"{scale * found.p99:.{digits}f}"
