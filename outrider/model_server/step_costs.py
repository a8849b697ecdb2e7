"""What this replica's forward passes cost: measured once at its start, corrected as it works.

A pass over n tokens of r sequences takes curve(n) + (r - 1) * row_s, times a scale that follows
what passes really take (longer contexts, a shared machine). Orchestrators choose γ by it. Knows
nothing of γ; lives on the device thread, `report` may be read on any.
"""

from __future__ import annotations

import time
from bisect import bisect_left

import numpy as np
from numpy.random import default_rng

from outrider.engine import Append, ServedEngine
from outrider.errors import KVFull
from outrider.replica import CostReport, interpolated

# In the order in which they are measured. The far ones first: where time is short a few points must
# say what many tokens cost, or passes of many sessions seem as cheap as those of one.
_CURVE_TOKENS = (1, 16, 64, 4, 256, 8, 32, 2, 128, 6, 24, 12, 48, 3, 96, 192)
_NUM_ROWS = 8
_CONTEXT_LEN = 32
_NUM_REPEATS = 3
# Points that are measured however long they take.
_MIN_POINTS = 3
# Of the whole time: a size that takes longer is not measured again.
_REPEAT_SHARE = 0.1
_SMOOTHING = 0.05
# How much of a surprise is put down to the size of the pass rather than to the machine.
_BENDING = 0.02
# What must have changed for orchestrators to be told.
_NEWS_RATIO = 0.03
_NEWS_INTERVAL_S = 0.25


class StepCosts:
    """`calibrate` once, `observe` every pass.

    `counts_rows`: the mean number of rows is one over rows, what each finds itself among; else one
    over passes. The first where a row is a generation, the second where one may have many.
    """

    def __init__(self, *, counts_rows: bool = False) -> None:
        self._counts_rows = counts_rows
        self._tokens = [1.0]
        self._seconds = [0.0]
        self._row_s = 0.0
        self._scale = 1.0
        # Of all rows, and of their squares.
        self._mean_num_rows = self._mean_square_rows = 1.0
        self._reported_at = 0.0
        self.report = self._make_report()

    def calibrate(self, engine: ServedEngine, max_tokens: int, budget_s: float = 3.0) -> None:
        """Times passes of 1 ... max_tokens tokens; leaves the engine's memory as it was.

        No further size is begun after `budget_s`: a slow model has few points, and is the steadier.
        """
        give_up_at = time.monotonic() + budget_s
        repeat_s = budget_s * _REPEAT_SHARE
        points: dict[int, float] = {}
        for num_tokens in _CURVE_TOKENS:
            if time.monotonic() > give_up_at and len(points) >= _MIN_POINTS:
                break
            if num_tokens <= max_tokens:
                seconds = _time_pass(engine, [num_tokens], repeat_s)
                if seconds is not None:
                    points[num_tokens] = seconds
        if not points:
            return
        # A shorter pass never takes more: what seems so was disturbed, and noise only adds.
        sizes = sorted(points)
        self._tokens = [float(n) for n in sizes]
        self._seconds = np.minimum.accumulate([points[n] for n in sizes[::-1]])[::-1].tolist()
        rows_s = _time_pass(engine, [1] * _NUM_ROWS, repeat_s)
        if rows_s is not None:
            self._row_s = max(0.0, rows_s - self._curve(_NUM_ROWS)) / (_NUM_ROWS - 1)
        self.report = self._make_report()

    def step_s(self, num_tokens: float, num_rows: float) -> float:
        """What a pass is expected to take now."""
        return self._scale * (self._curve(num_tokens) + max(0.0, num_rows - 1) * self._row_s)

    def _curve(self, num_tokens: float) -> float:
        return interpolated(num_tokens, self._tokens, self._seconds)

    def observe(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """A pass that was made; `num_rows` sequences."""
        self._mean_num_rows += _SMOOTHING * (num_rows - self._mean_num_rows)
        self._mean_square_rows += _SMOOTHING * (num_rows**2 - self._mean_square_rows)
        expected = self.step_s(num_tokens, num_rows)
        if expected > 0:  # a single stall must not look like a slower machine
            ratio = min(max(seconds / expected, 0.5), 2.0)
            self._scale *= 1 + _SMOOTHING * (ratio - 1)
            self._bend(num_tokens, 1 + _BENDING * (ratio - 1))
        now = time.monotonic()
        if now - self._reported_at > _NEWS_INTERVAL_S:
            self._reported_at = now
            fresh = self._make_report()
            if _differs(fresh, self.report):
                self.report = fresh

    def _bend(self, num_tokens: int, ratio: float) -> None:
        """Passes of about this size take `ratio` of what the curve says; others stay.

        But a longer pass never takes less: what is seen now is believed, not what was seen before.
        """
        seconds = self._seconds
        right = min(bisect_left(self._tokens, num_tokens), len(seconds) - 1)
        left = max(0, right - 1)
        for index in {left, right}:
            seconds[index] *= ratio
        for index in range(left):
            seconds[index] = min(seconds[index], seconds[left])
        for index in range(right + 1, len(seconds)):
            seconds[index] = max(seconds[index], seconds[right])

    def _make_report(self) -> CostReport:
        return CostReport(
            tuple(int(n) for n in self._tokens),
            tuple(self._scale * seconds for seconds in self._seconds),
            self._row_s * self._scale,
            self._mean_square_rows / self._mean_num_rows
            if self._counts_rows
            else self._mean_num_rows,
        )


def _differs(fresh: CostReport, former: CostReport) -> bool:
    pairs = [*zip(fresh.step_s, former.step_s, strict=False)]
    pairs.append((fresh.mean_num_rows, former.mean_num_rows))
    return any(abs(new - old) > _NEWS_RATIO * max(old, 1e-9) for new, old in pairs)


def _time_pass(engine: ServedEngine, counts: list[int], repeat_s: float) -> float | None:
    """Least seconds of a pass with so many tokens of each sequence; None without room for it.

    Not made again once it has taken `repeat_s`.
    """
    context_len = min(_CONTEXT_LEN, engine.info.max_context_len // 2)
    if context_len + max(counts) > engine.info.max_context_len:
        return None
    ids = default_rng(0).integers(0, engine.info.vocab_size, context_len + max(counts))
    sequences = []
    try:
        for count in counts:
            sequences.append(engine.store.open(context_len + count))
        engine.forward([Append(sequence, ids[:context_len], 0) for sequence in sequences])
        times: list[float] = []
        while len(times) < _NUM_REPEATS and sum(times) <= repeat_s:
            for sequence in sequences:
                engine.store.truncate(sequence, context_len)
            started_at = time.perf_counter()
            engine.forward(
                [
                    Append(sequence, ids[context_len : context_len + count], count)
                    for sequence, count in zip(sequences, counts, strict=True)
                ]
            )
            times.append(time.perf_counter() - started_at)
        return min(times)
    except KVFull:
        return None
    finally:
        for sequence in sequences:
            engine.store.free(sequence)
