"""A generation's draft tokens: the session at the draft replica, kept open, and what it proposes.

Optional by nature: without a replica, or with one that is slow, lost or wrong, there is no proposal
and nothing else happens. Knows no protobuf and nothing of the target.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

from orchestrator.generation.state import GenerationState
from orchestrator.replicas.draft_client import SILENT_RETRY_S, DraftHandle, DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.sessions import KvHandle
from orchestrator.speculation.gamma import GammaPolicy
from orchestrator.speculation.verification import Proposal


class Drafting:
    """Of one generation. `open_handle` opens the session, as it is then, at the link's replica.

    Each round: `next` right after its commitment, and `wait` where that gave nothing.
    """

    def __init__(
        self,
        pool: ReplicaPool[DraftLink] | None,
        open_handle: Callable[[DraftLink, int], DraftHandle],
        policy: GammaPolicy,
        kept: KvHandle | None = None,
    ) -> None:
        self._pool = pool
        self._link: DraftLink | None = None
        self._kept = kept
        self._open_handle = open_handle
        self._policy = policy
        self._handle: DraftHandle | None = None
        self._opened_at = 0.0
        # About then the replica has run what it was told at once, at the latest.
        self._prompt_until = 0.0
        # Replicas that were lost or had no room, and from when on they are asked again.
        self._retry_at: dict[str, float] = {}
        self._former_wire_bytes = 0
        self._is_waiting = False
        # With γ = 0 the replica is told once, and then nothing until drafts are wanted again.
        self._is_quiet = False
        # Proposals that were here when the verdict before them came.
        self.num_lookahead_hits = 0
        self.waited_s = 0.0

    @property
    def wire_bytes(self) -> int:
        return self._former_wire_bytes + (self._handle.wire_bytes if self._handle else 0)

    @property
    def _is_open(self) -> bool:
        return self._handle is not None and self._handle.lost is None

    def open(self) -> None:
        """Opens the session where there is a replica; when it was lost, at another.

        The one that lost it is asked again after a while.
        """
        if self._pool is None or self._is_open:
            return
        if self._handle is not None:  # it was lost
            after_s = self._handle.retry_after_s
            self._retry_at[self._handle.replica] = (
                inf if after_s is None else self._opened_at + after_s
            )
            self._leave()
        gamma, now = self._policy.decision.gamma, time.monotonic()
        if gamma == 0:
            return
        preferred = self._kept.replica if self._kept else None
        resting = [endpoint for endpoint, at in self._retry_at.items() if now < at]
        self._link = self._pool.pick(preferred, avoid=resting)
        if self._link is not None:
            self._opened_at = now
            self._handle, self._is_quiet = self._open_handle(self._link, gamma), False
            self._expect_prompt(self._handle.num_opened_tokens)

    def _expect_prompt(self, num_tokens: int) -> None:
        self._prompt_until = time.monotonic() + self._policy.costs.draft_prompt_s(num_tokens)

    def _leave(self) -> None:
        assert self._handle is not None, "it was open"
        self._former_wire_bytes += self._handle.wire_bytes
        self._handle.close(keep=False)
        self._handle = None

    def _leave_if_stopping(self) -> None:
        """A replica that is about to stop is left while another one is there."""
        if self._is_open and self._link is not None and not self._link.takes_generations:
            assert self._pool is not None, "there is a link"
            if self._pool.pick() is not None:
                self._leave()

    def next(self, state: GenerationState) -> Proposal | None:
        """The proposal for what is committed, if it is here; the replica is told what is wanted."""
        room = state.max_draft_tokens
        self._is_waiting = False
        self._leave_if_stopping()
        if room <= 0 or not self._is_open:
            if room > 0:
                self.open()  # its first proposal is for a later round
            return None
        assert self._handle is not None, "it is open"
        decision = self._policy.decision
        if decision.gamma == 0 and self._is_quiet:
            return None
        if self._is_quiet:  # no longer: first it has to catch up
            self._expect_prompt(self._handle.num_untold_tokens)
        self._is_quiet = decision.gamma == 0
        proposal = self._handle.proposal(self._least(room)) if decision.gamma else None
        if decision.gamma:
            self._policy.saw_lookahead(is_hit=proposal is not None)
        if proposal is not None:
            self.num_lookahead_hits += 1
            self._handle.commit(0, decision.gamma)
            return proposal.head(min(room, decision.gamma))
        is_late = self._prompt_until - time.monotonic() > decision.wait_s
        is_at_prompt = is_late and not self._policy.waits_always
        waiting_gamma = 0 if is_at_prompt else decision.waiting_gamma
        self._is_waiting = waiting_gamma > 0
        self._handle.commit(waiting_gamma, decision.gamma)
        return None

    def _least(self, room: int) -> int:
        """How many draft tokens a proposal must have.

        A round that takes fewer of a block leaves its rest to a later one, so a generation that
        waits for the γ it asked for takes whole blocks only.
        """
        decision = self._policy.decision
        return min(room, decision.gamma) if self._policy.waits_always and decision.is_fixed else 1

    @property
    def has_waited(self) -> bool:
        """Whether the row under way was held back for a proposal."""
        return self._is_waiting

    async def wait(self, state: GenerationState) -> Proposal | None:
        """After `next` gave none: waits for it as long as it is worth more than going without."""
        if not self._is_waiting:
            return None
        assert self._handle is not None, "it was asked"
        started_at = time.monotonic()
        least = self._least(state.max_draft_tokens)
        proposal = await self._handle.wait(self._policy.decision.wait_s, least)
        waited_s = time.monotonic() - started_at
        self.waited_s += waited_s
        # What the prompt took says nothing of the rounds after it, nor of other generations.
        late_s = waited_s - min(waited_s, max(0.0, self._prompt_until - started_at))
        if proposal is None:
            if self._is_open:  # one that is lost says nothing of the next
                self._policy.saw_no_proposal(late_s)
                if self._policy.waits_always:  # once, not in every round
                    self._retry_at[self._handle.replica] = time.monotonic() + SILENT_RETRY_S
                    self._leave()
            return None
        self._policy.saw_proposal(late_s, len(proposal.token_ids))
        return proposal.head(min(state.max_draft_tokens, max(1, self._policy.decision.gamma)))

    def kv(self, epoch: int) -> KvHandle | None:
        """What the replica is known to hold of the session."""
        if self._handle is None or self._handle.lost is not None:
            return None
        return KvHandle(self._handle.replica, epoch, self._handle.cached_len)

    def close(self, *, keep: bool) -> None:
        if self._handle is not None:
            if keep and self._is_open:
                self._handle.commit(0, 0)  # what is kept is all that was committed
            self._handle.close(keep=keep)
