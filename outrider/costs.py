"""What a replica's forward passes cost, as it tells: the plain value and how to read it. Pure.

Knows neither who measured it nor what is chosen by it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CostReport:
    """As model.proto's StepCosts: tokens of a pass, rising, and seconds it takes.

    `mean_num_rows`: of the target as a row finds it, a mean over rows; of the draft over passes.
    """

    num_tokens: tuple[int, ...] = (1,)
    step_s: tuple[float, ...] = (0.0,)
    row_s: float = 0.0
    mean_num_rows: float = 1.0

    def pass_s(self, num_tokens: float, num_rows: float) -> float:
        """Seconds of a pass over so many tokens of so many sequences."""
        curve_s = interpolated(num_tokens, self.num_tokens, self.step_s)
        return curve_s + max(0.0, num_rows - 1) * self.row_s


def interpolated(num_tokens: float, tokens: Sequence[float], seconds: Sequence[float]) -> float:
    """Piecewise linear; never below the first point; beyond the last the slope goes on."""
    if num_tokens <= tokens[0] or len(tokens) == 1:
        return seconds[0]
    right = min(bisect_left(tokens, num_tokens), len(tokens) - 1)
    left = right - 1
    slope = (seconds[right] - seconds[left]) / (tokens[right] - tokens[left])
    return seconds[left] + slope * (num_tokens - tokens[left])
