"""Search of the highest rate that meets the SLO: doubling, then bisection. Pure."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

# The search stops below a thousandth of the first rate.
_MAX_HALVINGS = 10


@dataclass(frozen=True)
class SearchResult:
    """`rate`: highest that passed; None: none did. `bound`: lowest that failed."""

    rate: float | None
    bound: float | None
    probes: tuple[tuple[float, bool], ...]


async def highest_rate(
    passes: Callable[[float], Awaitable[bool]],
    start: float,
    *,
    precision: float = 0.1,
    max_probes: int = 8,
) -> SearchResult:
    """Searches the highest rate: from `start` (above 0) by factors of two, then by bisection.

    Ends when the bounds are within `precision` of each other, or after `max_probes`. A rate that
    passes implies that lower ones do. Bisection uses the geometric mean.
    """
    good: float | None = None
    bad: float | None = None
    probes: list[tuple[float, bool]] = []
    rate = start
    while len(probes) < max_probes:
        has_passed = await passes(rate)
        probes.append((rate, has_passed))
        if has_passed:
            good = rate
        else:
            bad = rate
        if good is None:
            if rate <= start * 2.0**-_MAX_HALVINGS:
                break
            rate /= 2
        elif bad is None:
            rate *= 2
        elif bad / good <= 1 + precision:
            break
        else:
            rate = math.sqrt(good * bad)
    return SearchResult(good, bad, tuple(probes))
