"""Choice of sequences to free so that enough pages become available: as few groups as possible.

A page shared by several sequences becomes available only when all sequences that pin it are freed.
This module only chooses; it changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

from outrider.engine.kv.sequence import Sequence

Group = Collection[Sequence]


class Reclaim:
    """Set of chosen groups of sequences, and the pages that freeing them makes available.

    `num_pins(page)`: number of sequences that pin the page. `spared` pages are never counted. A
    sequence in several groups counts once.
    """

    def __init__(self, num_pins: Callable[[int], int], spared: Collection[int]) -> None:
        self._num_pins = num_pins
        self._spared = frozenset(spared)
        self._sequences: Counter[Sequence] = Counter()
        self._pins: Counter[int] = Counter()
        self._freed: set[int] = set()

    def choose(self, groups: Seq[Group], num_pages: int) -> list[int] | None:
        """Indices of the groups to free for `num_pages`, earlier groups first; None: not enough.

        No chosen group is superfluous.
        """
        chosen: list[int] = []
        for index, group in enumerate(groups):
            if len(self._freed) >= num_pages:
                break
            self._add(group)
            chosen.append(index)
        if len(self._freed) < num_pages:
            return None
        for index in reversed(chosen[:]):
            if len(self._freed) - self._num_lost(groups[index]) >= num_pages:
                self._remove(groups[index])
                chosen.remove(index)
        return chosen

    def _add(self, group: Group) -> None:
        for sequence in group:
            self._sequences[sequence] += 1
            if self._sequences[sequence] > 1:
                continue
            for page in sequence.pinned_pages:
                self._pins[page] += 1
                if self._pins[page] == self._num_pins(page) and page not in self._spared:
                    self._freed.add(page)

    def _num_lost(self, group: Group) -> int:
        """Pages that would not be available without the group."""
        exclusive = [sequence for sequence in group if self._sequences[sequence] == 1]
        pages = {page for sequence in exclusive for page in sequence.pinned_pages}
        return len(self._freed & pages)

    def _remove(self, group: Group) -> None:
        for sequence in group:
            self._sequences[sequence] -= 1
            if self._sequences[sequence] == 0:
                self._pins.subtract(sequence.pinned_pages)
                self._freed.difference_update(sequence.pinned_pages)
