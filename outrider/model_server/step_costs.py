"""Cost model of this replica's forward passes: calibrated at start, corrected at every pass.

A pass over n tokens of r sequences takes curve(n) + (r - 1) * row_s, times a scale. The scale
follows the measured durations (longer contexts, a shared machine). Orchestrators use the report to
choose γ. Lives on the device thread; `report` may be read on any thread.
"""

from __future__ import annotations

import time
from bisect import bisect_left

import numpy as np
from numpy.random import default_rng

from outrider.engine import Append, ServedEngine
from outrider.errors import KVFull
from outrider.replica import CostReport, interpolated

# In the order of measurement. Large sizes come early: if time is short, the few measured points
# must cover many tokens. Otherwise passes of many sessions would seem as cheap as those of one.
_CURVE_TOKENS = (1, 16, 64, 4, 256, 8, 32, 2, 128, 6, 24, 12, 48, 3, 96, 192)
_NUM_ROWS = 8
_CONTEXT_LEN = 32
_NUM_REPEATS = 3
# Points that are always measured, however long they take.
_MIN_POINTS = 3
# Share of the time budget. A size that takes longer is measured only once.
_REPEAT_SHARE = 0.1
_SMOOTHING = 0.05
# Share of a deviation that is attributed to the size of the pass instead of the machine.
_CURVE_SMOOTHING = 0.02
# Relative change that is reported to orchestrators.
_MIN_CHANGE = 0.03
_REPORT_INTERVAL_S = 0.25


class StepCosts:
    """Step costs. Call `calibrate` once, then `observe` for every pass.

    `counts_rows`: the reported mean number of rows is weighted by rows: the batch size that a row
    sees. Otherwise it is a mean over passes. Use the former where a row is a generation, the latter
    where a generation may have several rows.
    """

    def __init__(self, *, counts_rows: bool = False) -> None:
        self._counts_rows = counts_rows
        self._tokens = [1.0]
        self._seconds = [0.0]
        self._row_s = 0.0
        self._scale = 1.0
        # Means of the number of rows and of its square.
        self._mean_num_rows = self._mean_square_rows = 1.0
        self._reported_at = 0.0
        self.report = self._make_report()

    def calibrate(self, engine: ServedEngine, max_tokens: int, budget_s: float = 3.0) -> None:
        """Measures passes of 1 to max_tokens tokens; leaves the engine's memory unchanged.

        Starts no further size after `budget_s`, so a slow model gets few points.
        """
        deadline = time.monotonic() + budget_s
        repeat_s = budget_s * _REPEAT_SHARE
        points: dict[int, float] = {}
        for num_tokens in _CURVE_TOKENS:
            if time.monotonic() > deadline and len(points) >= _MIN_POINTS:
                break
            if num_tokens <= max_tokens:
                seconds = _time_pass(engine, [num_tokens], repeat_s)
                if seconds is not None:
                    points[num_tokens] = seconds
        if not points:
            return
        # A smaller pass never takes longer. Noise only adds time, so the minimum is right.
        sizes = sorted(points)
        self._tokens = [float(n) for n in sizes]
        self._seconds = np.minimum.accumulate([points[n] for n in sizes[::-1]])[::-1].tolist()
        rows_s = _time_pass(engine, [1] * _NUM_ROWS, repeat_s)
        if rows_s is not None:
            self._row_s = max(0.0, rows_s - self._curve(_NUM_ROWS)) / (_NUM_ROWS - 1)
        self.report = self._make_report()

    def step_s(self, num_tokens: float, num_rows: float) -> float:
        """Expected duration of a pass now, in seconds."""
        return self._scale * (self._curve(num_tokens) + max(0.0, num_rows - 1) * self._row_s)

    def _curve(self, num_tokens: float) -> float:
        return interpolated(num_tokens, self._tokens, self._seconds)

    def observe(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """Records a pass over `num_rows` sequences."""
        self._mean_num_rows += _SMOOTHING * (num_rows - self._mean_num_rows)
        self._mean_square_rows += _SMOOTHING * (num_rows**2 - self._mean_square_rows)
        expected = self.step_s(num_tokens, num_rows)
        if expected > 0:  # clamped: a single stall must not look like a slower machine
            ratio = min(max(seconds / expected, 0.5), 2.0)
            self._scale *= 1 + _SMOOTHING * (ratio - 1)
            self._adjust_curve(num_tokens, 1 + _CURVE_SMOOTHING * (ratio - 1))
        now = time.monotonic()
        if now - self._reported_at > _REPORT_INTERVAL_S:
            self._reported_at = now
            report = self._make_report()
            if _differs(report, self.report):
                self.report = report

    def _adjust_curve(self, num_tokens: int, ratio: float) -> None:
        """Scales the two curve points next to `num_tokens` by `ratio`.

        The curve stays monotonic: other points are moved to fit the new measurement.
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


def _differs(current: CostReport, previous: CostReport) -> bool:
    pairs = [*zip(current.step_s, previous.step_s, strict=False)]
    pairs.append((current.mean_num_rows, previous.mean_num_rows))
    return any(abs(new - old) > _MIN_CHANGE * max(old, 1e-9) for new, old in pairs)


def _time_pass(engine: ServedEngine, counts: list[int], repeat_s: float) -> float | None:
    """Minimum seconds of a pass with `counts[i]` tokens of sequence i; None without KV room.

    Repeated only while all repetitions together take less than `repeat_s`.
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
