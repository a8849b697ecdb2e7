"""Row budget of the draft: how many rows a pass takes, and which extensions of the trees.

Decides between generations that wait for draft tokens and drafting ahead of verify results. With
few generations most rows draft ahead, for many outcomes. The more generations wait, the fewer rows
are left for that, down to none. The generations then form alternating batches: the draft works for
some while the target verifies others.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Protocol, TypeVar

from draft_service.tree.block import Extension
from draft_service.tree.tree import MIN_PROB, SpeculationTree
from outrider.model_server.step_costs import StepCosts

# Least sum of the rows' probabilities for a pass that only drafts ahead. Even on an idle device a
# pass costs power, and memory bandwidth that other processes may share.
_MIN_PASS_PROB = 0.05
# Drafting ahead takes at most this share of a round, and slows needed rows by at most this factor.
_ROUND_SHARE = 0.8
_SLOWDOWN = 1.05
# A step this many times as long as a single row's is compute-bound: more rows save no time.
_FULL_RATIO = 2.0
_MIN_BATCH = 8
_MAX_ROWS = 256
_SMOOTHING = 0.1


class RowBudget:
    """Row budget of one replica. At most `max_branches` rows of a pass draft ahead."""

    def __init__(self, costs: StepCosts, max_branches: int) -> None:
        self._costs = costs
        self._max_branches = max_branches
        self._round_s: float | None = None
        self._num_steps = 6.0

    def observe_round(self, duration_s: float, gamma: int) -> None:
        """Records the time between a session's commits; `gamma`: tokens per block drafted ahead."""
        last = self._round_s if self._round_s is not None else duration_s
        # A session that paused does not make rounds longer.
        self._round_s = last + _SMOOTHING * (min(duration_s, 4 * last) - last)
        self._num_steps += _SMOOTHING * (gamma + 2 - self._num_steps)

    def num_rows(self, num_waiting: int) -> tuple[int, int]:
        """(needed rows, all rows) of the next pass, if `num_waiting` generations need a row."""
        max_batch = max(_MIN_BATCH, self._most_within(_FULL_RATIO * self._step_s(1)))
        num_waiting = min(num_waiting, max_batch)
        if num_waiting:
            limit_s = _SLOWDOWN * self._step_s(num_waiting)
        elif self._round_s is not None:
            limit_s = _ROUND_SHARE * self._round_s / self._num_steps
        else:
            limit_s = _FULL_RATIO * self._step_s(1)
        total = max(1, self._most_within(limit_s))
        return num_waiting, min(max(num_waiting, total), num_waiting + self._max_branches)

    def _step_s(self, num_rows: int) -> float:
        return self._costs.step_s(num_rows, num_rows)

    def _most_within(self, limit_s: float) -> int:
        """The largest number of rows, at least 1, whose step takes at most `limit_s`."""
        least, most = 1, _MAX_ROWS
        while least < most:
            middle = (least + most + 1) // 2
            if self._step_s(middle) <= limit_s:
                least = middle
            else:
                most = middle - 1
        return least


class HasTree(Protocol):
    @property
    def tree(self) -> SpeculationTree: ...


Key = TypeVar("Key")
Owner = TypeVar("Owner", bound=HasTree)


def best_extensions(owners: dict[Key, Owner], num_rows: int) -> Iterator[tuple[Owner, Extension]]:
    """Yields up to `num_rows` most likely extensions of all trees, best first.

    Yields nothing if all together are too unlikely. Removes owners without extensions. The caller
    opens an extension's alternative before it takes the next extension: the block's next
    alternative is then considered.
    """
    heap: list[tuple[float, int, Owner, Extension]] = []
    for key, owner in list(owners.items()):
        extensions = [
            extension for extension in owner.tree.extensions() if extension.prob >= MIN_PROB
        ]
        if not extensions:
            del owners[key]
        heap += [(-e.prob, i, owner, e) for i, e in enumerate(extensions, len(heap))]
    if -sum(item[0] for item in heap) < _MIN_PASS_PROB:
        owners.clear()  # a change adds them again
        return
    heapq.heapify(heap)
    count = len(heap)
    for _ in range(num_rows):
        if not heap:
            return
        _, _, owner, extension = heapq.heappop(heap)
        yield owner, extension
        block = extension.block
        if extension.opens and owner.tree.may_open(block):
            prob = block.prob * block.alternatives[0].prob
            if prob >= MIN_PROB:
                heapq.heappush(heap, (-prob, count, owner, Extension(prob, block, opens=True)))
                count += 1
