"""The draft tier as a draft source: one generation's session at a draft replica, with failover."""

from __future__ import annotations

import time
from math import inf

from orchestrator.replicas.draft_client import (
    SILENT_RETRY_S,
    DraftHandle,
    DraftLink,
)
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.speculation.draft_source import DraftRequest
from orchestrator.speculation.verification import Proposal


class TierDrafts:
    """A `DraftSource`. A lost replica is left for another one, and tried again after a while.

    `preferred`: the replica that may hold the session's KV from the turn before.
    """

    def __init__(
        self, pool: ReplicaPool[DraftLink], request: DraftRequest, preferred: str | None = None
    ) -> None:
        self._pool = pool
        self._request = request
        self._preferred = preferred
        self._link: DraftLink | None = None
        self._handle: DraftHandle | None = None
        self._opened_at = 0.0
        # Replicas that were lost, had no room or were silent, and when they may be used again.
        self._retry_at: dict[str, float] = {}
        self._former_wire_bytes = 0

    @property
    def is_open(self) -> bool:
        return self._handle is not None and self._handle.lost is None

    @property
    def may_open(self) -> bool:
        return True

    @property
    def replica(self) -> str | None:
        return self._handle.replica if self._handle is not None and self.is_open else None

    @property
    def cached_len(self) -> int:
        return self._handle.cached_len if self._handle is not None else 0

    @property
    def num_behind(self) -> int:
        return self._handle.num_behind if self._handle is not None else 0

    @property
    def wire_bytes(self) -> int:
        return self._former_wire_bytes + (self._handle.wire_bytes if self._handle else 0)

    def open(self, gamma: int, lookahead: int) -> bool:
        if self.is_open:
            return True
        if self._handle is not None:  # it was lost
            after_s = self._handle.retry_after_s
            retry_at = inf if after_s is None else self._opened_at + after_s
            self._retry_at[self._handle.replica] = retry_at
            self._leave()
        if gamma == 0:
            return False
        now = time.monotonic()
        resting = [endpoint for endpoint, at in self._retry_at.items() if now < at]
        self._link = self._pool.pick(self._preferred, avoid=resting)
        if self._link is None:
            return False
        self._opened_at = now
        self._handle = self._link.open(self._request, gamma, lookahead)
        return True

    def refresh(self) -> None:
        is_draining = self._link is not None and not self._link.takes_generations
        if self.is_open and is_draining and self._pool.pick() is not None:
            self._leave()

    def propose(self, least: int = 1) -> Proposal | None:
        return self._handle.proposal(least) if self._handle is not None else None

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        if self._handle is not None:
            self._handle.commit(gamma, ahead_gamma)

    async def wait(self, timeout_s: float, least: int = 1) -> Proposal | None:
        return await self._handle.wait(timeout_s, least) if self._handle is not None else None

    def rest(self) -> None:
        if self._handle is not None:
            self._retry_at[self._handle.replica] = time.monotonic() + SILENT_RETRY_S
            self._leave()

    def close(self, *, keep: bool) -> None:
        if self._handle is not None:
            self._handle.close(keep=keep)

    def _leave(self) -> None:
        assert self._handle is not None, "it was open"
        self._former_wire_bytes += self._handle.wire_bytes
        self._handle.close(keep=False)
        self._handle = None
