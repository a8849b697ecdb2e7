"""Row budget of the draft: how many rows a pass takes, and which extensions of the trees.

Decides between generations that wait for draft tokens and drafting ahead of verify results. With
few generations most rows draft ahead, for many outcomes. The more generations wait, the fewer rows
are left for that, down to none. The generations then form alternating batches: the draft works for
some while the target verifies others.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Iterator
from typing import Protocol, TypeVar

from draft_service.fair_share import FairShare
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


class RoundPace:
    """Mean duration and length of one target's rounds."""

    def __init__(self) -> None:
        self._round_s: float | None = None
        self._num_steps = 6.0

    def observe(self, duration_s: float, gamma: int) -> None:
        """Records the time between a session's commits; `gamma`: tokens per block drafted ahead."""
        last = self._round_s if self._round_s is not None else duration_s
        # A session that paused does not make rounds longer.
        self._round_s = last + _SMOOTHING * (min(duration_s, 4 * last) - last)
        self._num_steps += _SMOOTHING * (gamma + 2 - self._num_steps)

    @property
    def step_s(self) -> float | None:
        """Longest step with which a block is drafted ahead in time; None before the first round."""
        return None if self._round_s is None else _ROUND_SHARE * self._round_s / self._num_steps


class RowBudget:
    """Row budget of one replica. At most `max_branches` rows of a pass draft ahead."""

    def __init__(self, costs: StepCosts, max_branches: int) -> None:
        self._costs = costs
        self._max_branches = max_branches

    def num_rows(self, num_waiting: int, paces: Iterable[RoundPace] = ()) -> tuple[int, int]:
        """(needed rows, all rows) of the next pass, if `num_waiting` generations need a row.

        `paces`: of the targets with work. The fastest one limits drafting ahead.
        """
        max_batch = max(_MIN_BATCH, self._most_within(_FULL_RATIO * self._step_s(1)))
        num_waiting = min(num_waiting, max_batch)
        if num_waiting:
            limit_s = _SLOWDOWN * self._step_s(num_waiting)
        else:
            known = [step_s for pace in paces if (step_s := pace.step_s) is not None]
            limit_s = min(known, default=_FULL_RATIO * self._step_s(1))
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

    @property
    def target(self) -> Hashable: ...


Key = TypeVar("Key")
Owner = TypeVar("Owner", bound=HasTree)
_Heap = list[tuple[float, int, Owner, Extension]]


def best_extensions(
    owners: dict[Key, Owner], num_rows: int, share: FairShare[Hashable]
) -> Iterator[tuple[Owner, Extension]]:
    """Yields up to `num_rows` extensions: of each target in its turn the most likely one.

    With one target: the most likely ones of all trees, best first. Yields nothing if all together
    are too unlikely. Removes owners without extensions. The caller opens an extension's alternative
    before it takes the next extension: the block's next alternative is then considered.
    """
    heaps: dict[Hashable, _Heap[Owner]] = {}
    count, total = 0, 0.0
    for key, owner in list(owners.items()):
        extensions = [
            extension for extension in owner.tree.extensions() if extension.prob >= MIN_PROB
        ]
        if not extensions:
            del owners[key]
            continue
        heap = heaps.setdefault(owner.target, [])
        heap += [(-e.prob, i, owner, e) for i, e in enumerate(extensions, count)]
        count += len(extensions)
        total += sum(extension.prob for extension in extensions)
    if total < _MIN_PASS_PROB:
        owners.clear()  # a change adds them again
        return
    for heap in heaps.values():
        heapq.heapify(heap)
    turns, num_taken = share.turns(heaps), dict.fromkeys(heaps, 0)
    for number in range(count, count + num_rows):
        target = turns.take()
        if target is None:
            break
        _, _, owner, extension = heapq.heappop(heaps[target])
        num_taken[target] += 1
        yield owner, extension
        _push_next(heaps[target], number, owner, extension)
        if heaps[target]:
            turns.give_back(target, 1)
    share.settle(num_taken, [target for target, heap in heaps.items() if heap])


def _push_next(heap: _Heap[Owner], number: int, owner: Owner, extension: Extension) -> None:
    """Adds the next alternative of a block of which one was opened."""
    block = extension.block
    if extension.opens and owner.tree.may_open(block):
        prob = block.prob * block.alternatives[0].prob
        if prob >= MIN_PROB:
            heapq.heappush(heap, (-prob, number, owner, Extension(prob, block, opens=True)))
