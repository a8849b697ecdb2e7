"""The highest rate that keeps the promise, in few probes: doubling, then bisection.

Pure, but for the probe that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

# Below a thousandth of the first rate nothing will ever be served in time.
_MAX_HALVINGS = 10


@dataclass(frozen=True)
class Found:
    """`rate`: the highest that passed; None: none did. `bound`: the lowest that did not."""

    rate: float | None
    bound: float | None
    probes: tuple[tuple[float, bool], ...]


async def highest_rate(
    passes: Callable[[float], Awaitable[bool]],
    start: float,
    *,
    precision: float = 0.1,
    max_probes: int = 8,
) -> Found:
    """From `start` (above 0) by factors of two to where it changes, then by bisection between.

    Ends when the two are within `precision` of each other, or after `max_probes`. What passes at a
    rate is taken to pass below it. The middle of two rates is their geometric mean.
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
    return Found(good, bad, tuple(probes))
