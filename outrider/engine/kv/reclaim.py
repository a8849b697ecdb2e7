"""Which sequences to free so that enough pages are available: no more than needed, or none.

Pages shared by several sequences become available only when all that pin them are freed. Changes
nothing itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

from outrider.engine.kv.sequence import Sequence

Group = Collection[Sequence]


class Reclaim:
    """A selection of groups of sequences, and how many pages they make available.

    `num_pins(page)`: how many sequences pin it. `spared` pages are never counted. A sequence may be
    in several groups; it counts once.
    """

    def __init__(self, num_pins: Callable[[int], int], spared: Collection[int]) -> None:
        self._num_pins = num_pins
        self._spared = frozenset(spared)
        self._sequences: Counter[Sequence] = Counter()
        self._pins: Counter[int] = Counter()
        self._freed: set[int] = set()

    def choose(self, groups: Seq[Group], num_pages: int) -> list[int] | None:
        """Indices of the groups to free for `num_pages`: earlier ones first; None: not enough.

        No group among them can be left out.
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
        alone = [sequence for sequence in group if self._sequences[sequence] == 1]
        pages = {page for sequence in alone for page in sequence.pinned_pages}
        return len(self._freed & pages)

    def _remove(self, group: Group) -> None:
        for sequence in group:
            self._sequences[sequence] -= 1
            if self._sequences[sequence] == 0:
                self._pins.subtract(sequence.pinned_pages)
                self._freed.difference_update(sequence.pinned_pages)
