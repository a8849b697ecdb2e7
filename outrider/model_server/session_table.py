"""Which session owns which keys and values, on either tier: live generations and kept ones.

A generation is live between open and close, and reserves pages as it grows. A session's KV may be
kept for its next turn and is then evicted, least recently used first, when a live one needs room.
Fencing: a later epoch
of a session displaces an earlier one, never the reverse; the same epoch is its owner come again
over a new stream. Knows nothing of rows, drafts or the wire.

What is kept has a name and is exact to the token, so that a row can speak of it by length alone;
the prefix cache has full pages for anybody with the same tokens. Both hold the same pages: what is
kept and then evicted or expired is found again by its tokens, as long as its room is not wanted.
Lives on the device thread.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from outrider.engine.kv.store import KVStore, Sequence
from outrider.errors import KVFull, LeaseLost

State = TypeVar("State")
Urgency = tuple[int, float, int]


@dataclass(eq=False)
class LiveGeneration(Generic[State]):
    """One open generation. `token_ids[:sequence.length]` are the tokens whose KV is held.

    `urgency`: priority, start, number; of two that lack room the greater one gives way. `has_room`:
    it has reserved pages, so it has something to give.
    """

    session_id: str
    epoch: int
    urgency: Urgency
    sequence: Sequence
    token_ids: npt.NDArray[np.int64]
    state: State
    has_room: bool = False


@dataclass
class _CachedSession:
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
        self._live: dict[str, LiveGeneration[State]] = {}
        self._kept: OrderedDict[str, _CachedSession] = OrderedDict()
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

    def live_sessions(self) -> Iterable[LiveGeneration[State]]:
        return self._live.values()

    def find(self, session_id: str) -> LiveGeneration[State] | None:
        return self._live.get(session_id)

    def open(
        self,
        session_id: str,
        epoch: int,
        kept_epoch: int | None,
        max_len: int,
        started: tuple[int, float],
        state: State,
    ) -> LiveGeneration[State]:
        """Begins with kept KV of epoch `kept_epoch` (None: of any); reserves nothing yet.

        It can become `max_len` tokens long. `started`: its priority, and when it was begun. The
        caller closes a live generation of the session first (`find`). Raises LeaseLost if that one
        is of a later epoch.
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
        token_ids = np.zeros(max_len, np.int64)
        if kept is None:
            sequence = self._store.open(0, max_len)
        else:
            sequence = kept.sequence
            self._store.unpark(sequence, max_len)
            num_kept = min(sequence.length, max_len)
            token_ids[:num_kept] = kept.token_ids[:num_kept]
        urgency = (*started, self.num_opened)
        opened = LiveGeneration(session_id, epoch, urgency, sequence, token_ids, state)
        opened.has_room = kept is not None
        if sequence.length > max_len:
            self.cut(opened, max_len)
        self._live[session_id] = opened
        self.num_opened += 1
        return opened

    def cut(self, live: LiveGeneration[State], length: int) -> None:
        """Forgets the tokens from `length` on; all of them where that would take pages.

        It takes pages where others share those that would be written again.
        """
        if length == live.sequence.length:
            return
        with contextlib.suppress(KVFull):
            if length:
                self._store.truncate(live.sequence, length)
                return
        self._store.free(live.sequence)
        live.sequence = self._store.open(0, len(live.token_ids))

    def reserve(
        self, live: LiveGeneration[State], num_tokens: int, *, context_len: int = 0, margin: int = 0
    ) -> int:
        """Room for the first `num_tokens` tokens; then `margin` pages are left to be had.

        With a `context_len`, which the buffer has, it begins with what is cached of so many tokens
        but the last one, whose logits are wanted; how many were found. Pages that it shares with
        others need no room. To be called before they are run. Raises KVFull where there is no room
        even without all that is kept.
        """
        sequence, store = live.sequence, self._store
        held = sequence.length
        is_asked = self._prefix_cache and context_len > 0
        while True:
            try:
                if is_asked:
                    ids = live.token_ids[: context_len - 1]
                    num_found = store.extend_with_prefix(sequence, num_tokens, ids, margin=margin)
                else:
                    num_found = 0
                    store.extend(sequence, num_tokens, margin=margin)
                break
            except KVFull as error:
                if not self._kept or store.to_free((), error) is None:
                    raise
                self._evict()
        live.has_room = True
        if is_asked:
            self.num_prefix_queried += context_len - held
            self.num_prefix_hits += num_found
        return num_found

    def _evict(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._store.free(kept.sequence)

    def touch_prefix(self, token_ids: npt.NDArray[Any]) -> None:
        """To be called before room is reserved for these tokens: it is not made at their cost."""
        self._store.touch_prefix(token_ids)

    def cache_prefix(self, live: LiveGeneration[State], committed_len: int) -> None:
        """Lets others re-use what is held of the first `committed_len` tokens.

        Committed ones only: what may still be rolled back is not worth a place.
        """
        if self._prefix_cache:
            self._store.cache_prefix(live.sequence, live.token_ids[:committed_len])

    def forget_prefix(self, live: LiveGeneration[State]) -> None:
        """What is cached of its tokens may be wrong: it is run anew by whoever has them next."""
        self._store.forget_prefix(live.token_ids)

    def close(self, live: LiveGeneration[State], *, keep: bool) -> None:
        """Ends the generation; its KV is freed, or kept for a later turn. Once only."""
        if self._live.get(live.session_id) is not live:
            return
        del self._live[live.session_id]
        self.num_closed += 1
        if keep and live.sequence.length:  # what was reserved for more tokens is not kept
            self._store.shrink(live.sequence, live.sequence.length)
            self._store.park(live.sequence)
            self._kept[live.session_id] = _CachedSession(live.epoch, live.sequence, live.token_ids)
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
