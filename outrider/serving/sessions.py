"""Which session owns which keys and values, on either tier: live generations and kept ones.

A generation is live between open and close; a session's KV may be kept for its next turn and is
then evicted, least recently used first, when a new reservation needs room. Fencing: a later epoch
of a session displaces an earlier one, never the reverse; the same epoch is its owner come again
over a new stream. Knows nothing of rows, drafts or the wire.

What is kept has a name and is exact to the token, so that a row can speak of it by length alone;
the prefix cache has full pages for anybody with the same tokens. Both hold the same pages: what is
kept and then evicted or expired is found again by its tokens, as long as its room is not wanted.
Lives on the device thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from outrider.engine.kv_store import KVStore, Sequence
from outrider.errors import KVFull, LeaseLost

State = TypeVar("State")


@dataclass(eq=False)
class Live(Generic[State]):
    """One open generation. `token_ids[:sequence.length]` are the tokens whose KV is held."""

    session_id: str
    epoch: int
    sequence: Sequence
    token_ids: npt.NDArray[np.int64]
    state: State


@dataclass
class _Kept:
    epoch: int
    sequence: Sequence
    token_ids: npt.NDArray[np.int64]
    since: float = field(default_factory=time.monotonic)


class SessionTable(Generic[State]):
    """All sessions of one replica; `state` is what the service hangs on a live generation."""

    def __init__(self, store: KVStore, idle_ttl_s: float, *, prefix_cache: bool = True) -> None:
        self._store = store
        self._idle_ttl_s = idle_ttl_s
        self._prefix_cache = prefix_cache
        self._live: dict[str, Live[State]] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.num_opened = 0
        self.num_closed = 0
        # Context tokens that the prefix cache was asked for, and those it had.
        self.num_prefix_queried = 0
        self.num_prefix_hits = 0

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def live_sessions(self) -> Iterable[Live[State]]:
        return self._live.values()

    def find(self, session_id: str) -> Live[State] | None:
        return self._live.get(session_id)

    def open(
        self, session_id: str, epoch: int, kept_epoch: int | None, max_len: int, state: State
    ) -> Live[State]:
        """Reserves `max_len` tokens, on top of kept KV of epoch `kept_epoch` (None: of any).

        The caller closes a live generation of the session first (`find`). Raises LeaseLost if that
        one is of a later epoch, KVFull if there is no room even without all that is kept.
        """
        self.expire()
        live = self._live.get(session_id)
        if live is not None:
            if live.epoch > epoch:
                raise LeaseLost(f"session {session_id} is held by epoch {live.epoch}, not {epoch}")
            self.close(live, keep=False)
        kept = self._kept.pop(session_id, None)
        if kept is not None and kept_epoch not in (None, kept.epoch):
            self._store.free(kept.sequence)
            kept = None
        if kept is not None and kept.sequence.length > max_len:
            self._store.truncate(kept.sequence, max_len)
        sequence = self._reserve(kept.sequence if kept else None, max_len)
        token_ids = np.zeros(max_len, np.int64)
        if kept is not None:
            token_ids[: sequence.length] = kept.token_ids[: sequence.length]
        opened = Live(session_id, epoch, sequence, token_ids, state)
        self._live[session_id] = opened
        self.num_opened += 1
        return opened

    def _reserve(self, sequence: Sequence | None, max_len: int) -> Sequence:
        while True:
            try:
                if sequence is None:
                    return self._store.open(max_len)
                self._store.extend(sequence, max(max_len, sequence.max_len))
                return sequence
            except KVFull:
                if self._kept:
                    self._evict()
                elif sequence is not None:  # its own old place may be what is in the way
                    self._store.free(sequence)
                    sequence = None
                else:
                    raise

    def _evict(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._store.free(kept.sequence)

    def touch_prefix(self, token_ids: npt.NDArray[Any]) -> None:
        """To be called before room is reserved for these tokens: it is not made at their cost."""
        self._store.touch_prefix(token_ids)

    def reuse_prefix(self, live: Live[State], context_len: int) -> int:
        """Begins with what is cached of the first `context_len` tokens; how many were found.

        To be called before they are run. The last one is never taken: its logits are wanted.
        """
        if not self._prefix_cache:
            return 0
        self.num_prefix_queried += context_len - live.sequence.length
        num_found = self._store.reuse_prefix(live.sequence, live.token_ids[: context_len - 1])
        self.num_prefix_hits += num_found
        return num_found

    def cache_prefix(self, live: Live[State], committed_len: int) -> None:
        """Lets others re-use what is held of the first `committed_len` tokens.

        Committed ones only: what may still be rolled back is not worth a place.
        """
        if self._prefix_cache:
            self._store.cache_prefix(live.sequence, live.token_ids[:committed_len])

    def forget_prefix(self, live: Live[State]) -> None:
        """What is cached of its tokens may be wrong: it is run anew by whoever has them next."""
        self._store.forget_prefix(live.token_ids)

    def close(self, live: Live[State], *, keep: bool) -> None:
        """Ends the generation; its KV is freed, or kept for a later turn. Once only."""
        if self._live.get(live.session_id) is not live:
            return
        del self._live[live.session_id]
        self.num_closed += 1
        if keep:  # what was reserved for more tokens is not kept
            self._store.shrink(live.sequence, max(1, live.sequence.length))
            self._kept[live.session_id] = _Kept(live.epoch, live.sequence, live.token_ids)
        else:
            self._store.free(live.sequence)

    def forget(self, session_id: str) -> None:
        """Frees what is kept of the session, if anything is."""
        kept = self._kept.pop(session_id, None)
        if kept is not None:
            self._store.free(kept.sequence)

    def expire(self) -> None:
        """Frees what has been kept for longer than the time to live."""
        now = time.monotonic()
        while self._kept and now - next(iter(self._kept.values())).since > self._idle_ttl_s:
            self._evict()
