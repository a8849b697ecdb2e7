"""A generation's draft tokens: the session at the draft replica, kept open, and what it proposes.

Optional by nature: without a replica, or with one that is slow, lost or wrong, there is no proposal
and nothing else happens. Knows no protobuf and nothing of the target.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

from orchestrator.blocks import Outcome, Proposal
from orchestrator.draft_link import DraftHandle, DraftLink
from orchestrator.patience import Patience
from orchestrator.session import GenerationState
from orchestrator.store import KvHandle


class Drafting:
    """Of one generation. `open_handle` opens the session, as it is then, at the link's replica."""

    def __init__(
        self,
        link: DraftLink | None,
        open_handle: Callable[[DraftLink], DraftHandle],
        patience: Patience,
    ) -> None:
        self._link = link
        self._open_handle = open_handle
        self._patience = patience
        self._handle: DraftHandle | None = None
        self._opened_at = self._retry_at = 0.0
        self._former_wire_bytes = 0
        # Proposals that were here when the verdict before them came.
        self.num_lookahead_hits = 0

    @property
    def wire_bytes(self) -> int:
        return self._former_wire_bytes + (self._handle.wire_bytes if self._handle else 0)

    @property
    def _is_open(self) -> bool:
        return self._handle is not None and self._handle.lost is None

    def open(self) -> None:
        """Opens the session where there is a replica; again, after a while, when it was lost."""
        if self._link is None or self._is_open:
            return
        if self._handle is not None:  # it was lost
            self._former_wire_bytes += self._handle.wire_bytes
            self._handle.close(keep=False)
            after_s, self._handle = self._handle.retry_after_s, None
            self._retry_at = inf if after_s is None else self._opened_at + after_s
        if not self._link.is_connected or time.monotonic() < self._retry_at:
            return
        self._opened_at = time.monotonic()
        self._handle = self._open_handle(self._link)

    def commit(self, outcome: Outcome, committed_len: int, *, is_last: bool) -> None:
        """Tells the replica how the round ended."""
        if self._handle is not None and self._handle.lost is None:
            self._handle.commit(outcome, committed_len, is_last=is_last)

    def verified(self, num_accepted: int) -> None:
        self._patience.saw_proposal(num_accepted)

    def take(self, state: GenerationState) -> Proposal | None:
        """The proposal for what is committed, if it was drafted ahead and is here."""
        room = state.max_draft_tokens
        proposal = self._handle.take() if self._handle is not None and room > 0 else None
        if proposal is None:
            return None
        self.num_lookahead_hits += 1
        return proposal.head(room)

    async def wait(self, state: GenerationState) -> Proposal | None:
        """Waits for the proposal as long as that is worth more than going without."""
        room = state.max_draft_tokens
        if room <= 0:
            return None
        if not self._is_open:
            self.open()  # its first proposal is for a later round
            return None
        assert self._handle is not None, "it is open"
        proposal = await self._handle.wait(self._patience.wait_s)
        if proposal is None:
            self._patience.saw_proposal(0)
            return None
        return proposal.head(room)

    def kv(self, epoch: int) -> KvHandle | None:
        """What the replica is known to hold of the session."""
        if self._handle is None or self._handle.lost is not None:
            return None
        return KvHandle(self._handle.replica, epoch, self._handle.cached_len)

    def close(self, *, keep: bool) -> None:
        if self._handle is not None:
            self._handle.close(keep=keep)
