"""Keys and values of a line of blocks, forked off another line or the trunk itself.

Owns how a generation's forks share and move keys and values; knows neither tokens nor chances.
Device thread only.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from outrider.engine import KVStore, Sequence
from outrider.errors import KVFull


@dataclass(eq=False)
class Branch:
    """`parent` None: the trunk, which holds the committed context. Else forked at `fork_len`."""

    sequence: Sequence
    parent: Branch | None = None
    fork_len: int = 0

    @property
    def num_shared(self) -> int:
        """How many tokens it has in common with the trunk."""
        shared, branch = self.sequence.length, self
        while branch.parent is not None:
            shared = min(shared, branch.fork_len)
            branch = branch.parent
        return shared


class KVBranches:
    """All strands of one generation. `trunk` keeps its place in memory for the session's life."""

    def __init__(self, store: KVStore, sequence: Sequence) -> None:
        self._store = store
        self.trunk = Branch(sequence)
        self._forks: set[Branch] = set()

    @property
    def fork_sequences(self) -> list[Sequence]:
        """All sequences but the trunk's."""
        return [fork.sequence for fork in self._forks]

    def fork(self, branch: Branch, length: int, max_len: int) -> Branch:
        """A strand that shares the first `length` tokens. Raises KVFull, changing nothing."""
        sequence = self._store.fork(branch.sequence, max_len, length=length)
        fork = Branch(sequence, branch, length)
        self._forks.add(fork)
        return fork

    def settle(self, winner: Branch, num_right: int) -> None:
        """What `winner` holds becomes the trunk's, cut to `num_right` tokens.

        The trunk stays one run of memory, read in place: the few tokens that the winner has of its
        own are copied into it; those that there is no room for are run again. `winner` is the trunk
        from here on.
        """
        store, trunk = self._store, self.trunk
        if winner is not trunk:
            length = min(winner.sequence.length, num_right)
            store.truncate(trunk.sequence, min(winner.num_shared, length, trunk.sequence.length))
            with contextlib.suppress(KVFull):
                store.extend(trunk.sequence, length)
            store.append_copy(trunk.sequence, winner.sequence, min(length, trunk.sequence.max_len))
            store.free(winner.sequence)
            self._forks.discard(winner)
            winner.sequence, winner.parent, winner.fork_len = trunk.sequence, None, 0
            self.trunk = winner
        elif num_right < trunk.sequence.length:
            store.truncate(trunk.sequence, num_right)

    def keep(self, used: set[Branch]) -> None:
        """Frees every fork that is not among `used`."""
        for fork in self._forks - used:
            self._store.free(fork.sequence)
        self._forks &= used
