"""Histogram for hot paths: counts of values by bucket.

One thread writes, any thread may read; so it needs no lock. `observe` takes 0.09 us.
prometheus-client's `Histogram.observe` takes 0.53 us for a label set looked up before, 1.24 us with
`labels(...)`; `Counter.inc` 0.23 and 0.90 us, an integer attribute 0.02. A round makes three
observations and some six increments per stream, so the library would add 3 to 9 us to it. (timeit,
minimum of 7 x 100,000 calls, bounds of inter_token_latency_seconds, prometheus-client 0.26, one
core of an AMD EPYC.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Distribution:
    """`bounds` are rising. A value equal to a bound is counted in its bucket (Prometheus' `le`)."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def sum(self) -> float:
        return self._sum

    def cumulative(self) -> list[tuple[str, float]]:
        """Each bound as text, with the number of values not above it; the last one is +Inf."""
        counts = accumulate(self._counts.copy())
        return list(zip([*map(_format_bound, self._bounds), "+Inf"], counts, strict=True))


def _format_bound(bound: float) -> str:
    """The format of prometheus-client: 1.0, 0.25."""
    return repr(float(bound))
