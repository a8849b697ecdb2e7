"""KV ownership by session, for both tiers: live generations and idle sessions.

A generation is live between open and close and reserves pages as it grows. A closed session's KV
may stay cached for its next turn. Such idle sessions are evicted, least recently used first, when
a live generation needs pages.

Fencing: a later epoch of a session displaces an earlier one, never the reverse. The same epoch is
its owner that has reconnected over a new stream.

An idle session's KV is found by session id and is exact to the token, so a request can refer to it
by its length. The prefix cache holds full pages and serves any generation with the same tokens.
Both share pages: an evicted session is still found by its tokens until its pages are needed.
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
    """One open generation. `token_ids[:sequence.length]` are the tokens whose KV is in the pages.

    `urgency`: priority, start time, number. When pages run out, the generation with the greatest
    urgency tuple is preempted. `has_pages`: it has reserved pages, so preempting it frees some.
    """

    session_id: str
    epoch: int
    urgency: Urgency
    sequence: Sequence
    token_ids: npt.NDArray[np.int64]
    state: State
    has_pages: bool = False


@dataclass
class _CachedSession:
    epoch: int
    sequence: Sequence
    token_ids: npt.NDArray[np.int64]
    since: float = field(default_factory=time.monotonic)


class SessionTable(Generic[State]):
    """All sessions of one replica. `state` is the service's own data for a live generation."""

    def __init__(self, store: KVStore, idle_ttl_s: float, *, prefix_cache: bool = True) -> None:
        self._store = store
        self._idle_ttl_s = idle_ttl_s
        self._prefix_cache = prefix_cache
        self._live: dict[str, LiveGeneration[State]] = {}
        self._idle: OrderedDict[str, _CachedSession] = OrderedDict()
        self.num_opened = 0
        self.num_closed = 0
        # Context tokens looked up in the prefix cache, and those found.
        self.num_prefix_queried = 0
        self.num_prefix_hits = 0

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

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
        """Opens a generation on the idle session's KV if its epoch is `kept_epoch` (None: any).

        Reserves no pages yet; the sequence can grow to `max_len` tokens. `started`: priority and
        start time. A live generation of the session must be closed first (`find`). Raises LeaseLost
        if that one has a later epoch.
        """
        self.expire()
        live = self._live.get(session_id)
        if live is not None:
            if live.epoch > epoch:
                raise LeaseLost(
                    f"session {session_id} belongs to epoch {live.epoch}, later than {epoch}"
                )
            self.close(live, keep=False)
        idle = self._idle.pop(session_id, None)
        if idle is not None and kept_epoch not in (None, idle.epoch):
            self._store.free(idle.sequence)
            idle = None
        token_ids = np.zeros(max_len, np.int64)
        if idle is None:
            sequence = self._store.open(0, max_len)
        else:
            sequence = idle.sequence
            self._store.make_active(sequence, max_len)
            cached_len = min(sequence.length, max_len)
            token_ids[:cached_len] = idle.token_ids[:cached_len]
        urgency = (*started, self.num_opened)
        opened = LiveGeneration(session_id, epoch, urgency, sequence, token_ids, state)
        opened.has_pages = idle is not None
        if sequence.length > max_len:
            self.cut(opened, max_len)
        self._live[session_id] = opened
        self.num_opened += 1
        return opened

    def cut(self, live: LiveGeneration[State], length: int) -> None:
        """Drops the tokens from `length` on; all tokens if truncating needs pages and none is free.

        A page that is shared with others must be replaced before it can be written again.
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
        """Reserves pages for the first `num_tokens` tokens and leaves `margin` pages available.

        `context_len` > 0: the sequence starts with the cached prefix of its first `context_len`
        tokens, without the last one, whose logits are needed. Returns the number of tokens found.
        Shared pages need no room. Must be called before the tokens are run. Evicts idle sessions;
        raises KVFull if there is no room without them either.
        """
        sequence, store = live.sequence, self._store
        length = sequence.length
        uses_prefix = self._prefix_cache and context_len > 0
        while True:
            try:
                if uses_prefix:
                    ids = live.token_ids[: context_len - 1]
                    num_found = store.extend_with_prefix(sequence, num_tokens, ids, margin=margin)
                else:
                    num_found = 0
                    store.extend(sequence, num_tokens, margin=margin)
                break
            except KVFull as error:
                if not self._idle or store.choose_victims((), error) is None:
                    raise
                self._evict()
        live.has_pages = True
        if uses_prefix:
            self.num_prefix_queried += context_len - length
            self.num_prefix_hits += num_found
        return num_found

    def _evict(self) -> None:
        _, idle = self._idle.popitem(last=False)
        self._store.free(idle.sequence)

    def touch_prefix(self, token_ids: npt.NDArray[Any]) -> None:
        """Marks these tokens' cached pages as recently used, so that a reservation spares them."""
        self._store.touch_prefix(token_ids)

    def cache_prefix(self, live: LiveGeneration[State], committed_len: int) -> None:
        """Adds the KV of the first `committed_len` tokens to the prefix cache.

        Committed tokens only: tokens that may be rolled back are not worth caching.
        """
        if self._prefix_cache:
            self._store.cache_prefix(live.sequence, live.token_ids[:committed_len])

    def forget_prefix(self, live: LiveGeneration[State]) -> None:
        """Removes its tokens from the prefix cache, because their KV may be wrong."""
        self._store.forget_prefix(live.token_ids)

    def close(self, live: LiveGeneration[State], *, keep: bool) -> None:
        """Ends the generation and frees its KV, or caches it for a later turn. Idempotent."""
        if self._live.get(live.session_id) is not live:
            return
        del self._live[live.session_id]
        self.num_closed += 1
        if keep and live.sequence.length:  # pages reserved for more tokens are freed
            self._store.shrink(live.sequence, live.sequence.length)
            self._store.make_evictable(live.sequence)
            self._idle[live.session_id] = _CachedSession(live.epoch, live.sequence, live.token_ids)
        else:
            self._store.free(live.sequence)

    def forget(self, session_id: str) -> None:
        """Frees the cached KV of an idle session, if there is any."""
        idle = self._idle.pop(session_id, None)
        if idle is not None:
            self._store.free(idle.sequence)

    def expire(self) -> None:
        """Frees idle sessions older than the time to live."""
        now = time.monotonic()
        while self._idle and now - next(iter(self._idle.values())).since > self._idle_ttl_s:
            self._evict()
