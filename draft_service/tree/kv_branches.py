"""KV branches of one generation: the main one with the committed context, and forks for drafts.

Owns how forks share and move keys and values. Device thread only.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from outrider.engine import KVStore, Sequence
from outrider.errors import KVFull


@dataclass(eq=False)
class Branch:
    """Sequence forked from `parent` at length `fork_len`; the main branch has none."""

    sequence: Sequence
    parent: Branch | None = None
    fork_len: int = 0

    @property
    def num_shared(self) -> int:
        """Number of first tokens that it shares with the main branch."""
        shared, branch = self.sequence.length, self
        while branch.parent is not None:
            shared = min(shared, branch.fork_len)
            branch = branch.parent
        return shared


class KVBranches:
    """All branches of one generation. The main branch uses the session's sequence."""

    def __init__(self, store: KVStore, sequence: Sequence) -> None:
        self._store = store
        self.main = Branch(sequence)
        self._forks: set[Branch] = set()

    @property
    def fork_sequences(self) -> list[Sequence]:
        """All sequences except the main branch's."""
        return [fork.sequence for fork in self._forks]

    def fork(self, branch: Branch, length: int, max_len: int) -> Branch:
        """A branch that shares the first `length` tokens. Raises KVFull, changing nothing."""
        sequence = self._store.fork(branch.sequence, max_len, length=length)
        fork = Branch(sequence, branch, length)
        self._forks.add(fork)
        return fork

    def settle(self, winner: Branch, num_right: int) -> None:
        """Makes `winner` the main branch, with its first `num_right` tokens.

        The winner's own tokens, which are few, are copied into the session's sequence. So it stays
        one run of memory, which attention reads in place. Tokens without KV room are dropped; they
        are run again later.
        """
        store, main = self._store, self.main
        if winner is not main:
            length = min(winner.sequence.length, num_right)
            store.truncate(main.sequence, min(winner.num_shared, length, main.sequence.length))
            with contextlib.suppress(KVFull):
                store.extend(main.sequence, length)
            store.append_copy(main.sequence, winner.sequence, min(length, main.sequence.max_len))
            store.free(winner.sequence)
            self._forks.discard(winner)
            winner.sequence, winner.parent, winner.fork_len = main.sequence, None, 0
            self.main = winner
        elif num_right < main.sequence.length:
            store.truncate(main.sequence, num_right)

    def free_unused(self, used: set[Branch]) -> None:
        """Frees every fork that is not in `used`."""
        for fork in self._forks - used:
            self._store.free(fork.sequence)
        self._forks &= used
