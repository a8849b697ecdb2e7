"""Which rows a draft step takes: how many it can afford, and the best of what is on offer.

Owns the trade between sessions that wait and drafting ahead of verdicts. With few sessions most
rows draft ahead, for many outcomes; the more wait, the fewer are left for that, down to the single
likeliest chain and then none: sessions then fall into cohorts, some drafted for while others are
verified. Knows nothing of models, tokens or KV.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Protocol, TypeVar

from draft_service.tree.block import Extension
from draft_service.tree.tree import MIN_PROB, SpeculationTree
from outrider.model_server.step_costs import StepCosts

# A pass whose rows have less in sum is not worth it even on an idle device: it costs power, and
# memory bandwidth that others may share.
_MIN_PASS_CHANCE = 0.05
# Drafting ahead may fill so much of a round, and slow those that wait by so much.
_ROUND_SHARE = 0.8
_SLOWDOWN = 1.05
# A step that takes this many times a single row's is bound by arithmetic: more rows are no cheaper.
_FULL_RATIO = 2.0
_MIN_COHORT = 8
_MAX_ROWS = 256
_SMOOTHING = 0.1


class RowBudget:
    """Of one replica; `max_branches` rows draft ahead at most."""

    def __init__(self, costs: StepCosts, max_branches: int) -> None:
        self._costs = costs
        self._max_branches = max_branches
        self._round_s: float | None = None
        self._num_steps = 6.0

    def observe_round(self, duration_s: float, gamma: int) -> None:
        """From one commit of a session to its next; blocks drafted meanwhile had γ tokens."""
        last = self._round_s if self._round_s is not None else duration_s
        # A session that paused is no longer round.
        self._round_s = last + _SMOOTHING * (min(duration_s, 4 * last) - last)
        self._num_steps += _SMOOTHING * (gamma + 2 - self._num_steps)

    def num_rows(self, num_waiting: int) -> tuple[int, int]:
        """How many of the waiting rows a step takes, and how many rows in all."""
        cohort = max(_MIN_COHORT, self._most_within(_FULL_RATIO * self._step_s(1)))
        num_waiting = min(num_waiting, cohort)
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
        """The most rows of a step that takes no longer; 1 at least."""
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
    """The likeliest offers of all trees, best first; an opening is followed by the block's next.

    Nothing where all of them are worth little. Takes the owners away that offer nothing. The caller
    opens an offer's alternative before it asks for the next one.
    """
    heap: list[tuple[float, int, Owner, Extension]] = []
    for key, owner in list(owners.items()):
        extensions = [
            extension for extension in owner.tree.extensions() if extension.prob >= MIN_PROB
        ]
        if not extensions:
            del owners[key]
        heap += [(-o.prob, i, owner, o) for i, o in enumerate(extensions, len(heap))]
    if -sum(item[0] for item in heap) < _MIN_PASS_CHANCE:
        owners.clear()  # until something changes
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
