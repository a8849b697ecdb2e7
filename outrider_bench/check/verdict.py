"""Verdict of a check: one line and whether the draft is worth it. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from outrider_bench.check.cost import TokenCost
from outrider_bench.check.results import Acceptance, PassCost, SpeedUp


@dataclass(frozen=True)
class Verdict:
    """`text`: one line. `score`: geometric mean of the speed-ups, to rank drafts; 0 if refused."""

    text: str
    is_worth_it: bool
    score: float


def verdict(
    refused: Sequence[str],
    speed_ups: Sequence[SpeedUp],
    acceptances: Sequence[Acceptance],
    costs: Sequence[PassCost],
    min_speed_up: float,
    token_costs: Sequence[TokenCost] = (),
    *,
    what: str | None = None,
    flag: str = "",
) -> Verdict:
    """Worth it: at any temperature and number of streams the speed-up is `min_speed_up` or more.

    `what`: what to use; None: the best γ. `flag`: that the services need.
    """
    if refused:
        return Verdict(f"do not speculate: {refused[0]}", False, 0.0)
    if not speed_ups:
        text = "nothing in the files is against speculation; its speed was not measured"
        return Verdict(text, True, 1.0)
    score = statistics.geometric_mean(one.value for one in speed_ups)
    good = {one.temperature for one in speed_ups if one.value >= min_speed_up}
    if not good:
        return Verdict(_against(speed_ups, acceptances, costs, min_speed_up), False, score)
    used = [one for one in speed_ups if one.temperature in good]
    what = what or f"γ ≈ {_best_gamma(used)}"
    text = f"use {what}{flag}: {_in_favour(used, speed_ups, good)}"
    prices = [one for one in token_costs if one.temperature in good]
    return Verdict(text + _price(prices), True, score)


def _price(prices: Sequence[TokenCost]) -> str:
    """Cost per million tokens at the most streams; the mean over temperatures."""
    if not prices:
        return ""
    num = max(one.num_streams for one in prices)
    own = [one for one in prices if one.num_streams == num]
    with_drafts, plain = (
        statistics.fmean(values)
        for values in ([one.with_drafts for one in own], [one.plain for one in own])
    )
    return (
        f"; a million tokens cost {with_drafts:.3g} instead of {plain:.3g} at {_streams(num)}, "
        f"with {max(one.num_drafts for one in own)} draft per target"
    )


def _in_favour(used: Sequence[SpeedUp], all_of: Sequence[SpeedUp], good: set[float]) -> str:
    """What to use, and what it brings by number of streams."""
    counts = sorted({one.num_streams for one in used})
    parts = [
        f"{_range([one.value for one in used if one.num_streams == num])} at {_streams(num)}"
        for num in counts
    ]
    how = "measured" if all(one.measured is not None for one in used) else "predicted"
    bad = sorted({one.temperature for one in all_of} - good)
    exception = f"; not at T = {', '.join(f'{t:g}' for t in bad)}" if bad else ""
    return f"{', '.join(parts)} ({how}){exception}"


def _best_gamma(used: Sequence[SpeedUp]) -> int:
    """γ for the fewest streams: the median over temperatures, at least 1."""
    fewest = min(one.num_streams for one in used)
    gammas = (one.prediction.best_gamma for one in used if one.num_streams == fewest)
    return max(1, statistics.median_low(gammas))


def _against(
    speed_ups: Sequence[SpeedUp],
    acceptances: Sequence[Acceptance],
    costs: Sequence[PassCost],
    min_speed_up: float,
) -> str:
    best = max(speed_ups, key=lambda one: one.value)
    why = ""
    if acceptances:
        alphas = [one.alpha for one in acceptances]
        why += f"; α is {_numbers(alphas)}"
    if costs:
        why += f", a draft step takes {costs[0].ratio:.2f} of a target pass"
    return (
        f"do not speculate: {best.value:.2f}x at best ({_streams(best.num_streams)}, "
        f"T = {best.temperature:g}), less than {min_speed_up:g}x{why}"
    )


def _streams(num: int) -> str:
    return "one stream" if num == 1 else f"{num} streams"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.1f}" for value in (min(values), max(values)))
    return f"{low}x" if low == high else f"{low} to {high}x"


def _numbers(values: Sequence[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
