"""Draft tier as a draft source: one generation's session at a draft replica, with failover."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf

import structlog

from orchestrator.replicas.draft_client import UNRESPONSIVE_RETRY_S, DraftHandle, DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.rollout import DraftRollout
from orchestrator.replicas.target_client import TargetLink
from orchestrator.speculation.comparison import NUM_MEASURED_ROUNDS
from orchestrator.speculation.draft_source import DraftRequest
from orchestrator.speculation.draft_speed import DraftSpeed
from orchestrator.speculation.verification import Proposal
from outrider.draft_rollout import revision_name
from outrider.replica import CostReport

log = structlog.get_logger()

# Delay before a generation opens any draft replica again: none after its first failure, then this,
# doubled up to the maximum. Otherwise a request that stops every draft replica it reaches would
# stop one after another.
FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0


def revision_of(link: DraftLink) -> str:
    """Name of the draft revision that a replica serves; empty before it is connected."""
    return revision_name(link.model.model_fingerprint) if link.model is not None else ""


def num_replicas(pool: ReplicaPool[DraftLink]) -> Counter[str]:
    """Connected replicas by draft revision; may be called on any thread."""
    links = list(pool.links.values())
    return Counter(revision_of(link) for link in links if link.is_connected)


def draft_speed(
    targets: ReplicaPool[TargetLink],
    drafts: ReplicaPool[DraftLink],
    miss_rate: Callable[[], float],
    revision: str,
) -> DraftSpeed | None:
    """Measured costs with a draft revision: of the median replicas; None: not measured yet."""
    of_revision = [link for link in drafts.links.values() if revision_of(link) == revision]
    target, draft = _median_cost(targets.links.values()), _median_cost(of_revision)
    if target is None or draft is None:
        return None
    return DraftSpeed(target, draft, miss_rate(), _size(of_revision[0]))


def _size(link: DraftLink) -> str:
    model = link.model
    if model is None or not model.num_parameters:  # simulated
        return ""
    return f"{model.architecture} {model.num_parameters} {model.dtype}"


def _median_cost(links: Iterable[TargetLink | DraftLink]) -> CostReport | None:
    costs = [link.costs for link in links if link.is_connected and link.costs.step_s[0] > 0]
    costs.sort(key=lambda report: report.pass_s(1, 1))
    # As for one stream: the load of a replica is not a property of its model.
    return replace(costs[(len(costs) - 1) // 2], mean_num_rows=1.0) if costs else None


class TierDrafts:
    """`DraftSource` of the draft tier. After a loss it moves to another replica.

    `preferred`: the replica that may have the session's KV from the turn before. `rollout`: which
    draft revision it uses; None: any. `clock`: seconds.
    """

    def __init__(
        self,
        pool: ReplicaPool[DraftLink],
        request: DraftRequest,
        preferred: str | None = None,
        rollout: DraftRollout | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._request = request
        self._preferred = preferred
        self._clock = clock
        self._link: DraftLink | None = None
        self._handle: DraftHandle | None = None
        self._opened_at = 0.0
        # When a replica that was lost, full or unresponsive may be used again.
        self._retry_at: dict[str, float] = {}
        # When any replica may be used again after a failure, and the delay after the next one.
        self._open_at = 0.0
        self._backoff_s = 0.0
        self._former_wire_bytes = 0
        self._rollout = rollout or DraftRollout()
        self._assignment = self._rollout.assign()
        # Of the rollout, when this generation last followed it; and when it follows a change.
        self._epoch = self._rollout.epoch
        self._follow_at: float | None = None
        # Verified draft tokens of the assigned revision, since the assignment.
        self._num_accepted = self._num_rejected = 0

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
    def revision(self) -> str:
        return revision_of(self._link) if self._link is not None else self._assignment.revision

    @property
    def num_measured_rounds(self) -> int:
        return NUM_MEASURED_ROUNDS if self._assignment.is_compared else 0

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
        """As DraftSource.open. Returns False while a lost replica's proposals may still be used."""
        if self.is_open:
            return True
        if self._handle is not None:
            if self._handle.has_proposals:
                return False
            self._note_loss(self._handle)
            self._leave()
        now = self._clock()
        if gamma == 0 or now < self._open_at:
            return False
        self._link = self._pool.pick(self._preferred, self._avoided(), rank=self._rank)
        if self._link is None:
            return False
        self._opened_at = now
        self._handle = self._link.open(self._request, gamma, lookahead)
        return True

    def _avoided(self) -> list[str]:
        now = self._clock()
        return [endpoint for endpoint, at in self._retry_at.items() if now < at]

    def _rank(self, link: DraftLink) -> int:
        return self._rollout.rank(revision_of(link), self._assignment)

    def _note_loss(self, handle: DraftHandle) -> None:
        """Sets when this replica and, after a failure, any replica may be used again."""
        now, after_s = self._clock(), handle.retry_after_s
        self._retry_at[handle.replica] = inf if after_s is None else self._opened_at + after_s
        if not handle.has_failed:
            return
        if now - self._opened_at > MAX_BACKOFF_S:  # it worked for a while
            self._backoff_s = 0.0
        if self._backoff_s == FIRST_BACKOFF_S:  # once in a row of failures
            log.warning("drafts_back_off", replica=handle.replica, why=handle.lost)
        self._open_at = now + self._backoff_s
        self._backoff_s = min(max(2 * self._backoff_s, FIRST_BACKOFF_S), MAX_BACKOFF_S)

    def refresh(self) -> None:
        if self._epoch != self._rollout.epoch:
            self._epoch = self._rollout.epoch
            self._follow_at = self._clock() + self._rollout.move_delay_s()
        if self._follow_at is not None and self._clock() >= self._follow_at:
            self._follow_at = None
            self._follow_rollout()
        is_draining = self._link is not None and not self._link.takes_generations
        if self.is_open and is_draining and self._pool.pick() is not None:
            self._leave()

    def _follow_rollout(self) -> None:
        """Takes a new assignment after a change, and leaves a replica if there is a better one.

        The proposals dropped here have not been verified, and nothing depended on their tokens.
        """
        if self._assignment.version != self._rollout.record.version:
            self._report()
            self._assignment = self._rollout.assign()
        if self._link is None or not self.is_open:
            return
        better = self._pool.pick(avoid=self._avoided(), rank=self._rank)
        if better is not None and self._rank(better) < self._rank(self._link):
            self._leave()

    def observe_round(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        if not num_draft_tokens or self._link is None:
            return
        revision = revision_of(self._link)
        self._rollout.count(revision, num_draft_tokens, num_accepted, is_rejected)
        if revision == self._assignment.revision:
            self._num_accepted += num_accepted
            self._num_rejected += is_rejected

    def _report(self) -> None:
        """Reports the acceptance of the assigned revision, once."""
        self._rollout.observe(self._assignment, self._num_accepted, self._num_rejected)
        self._num_accepted = self._num_rejected = 0

    def propose(self, min_tokens: int = 1) -> Proposal | None:
        return self._handle.proposal(min_tokens) if self._handle is not None else None

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        if self._handle is not None:
            self._handle.commit(gamma, ahead_gamma)

    async def wait(self, timeout_s: float, min_tokens: int = 1) -> Proposal | None:
        return await self._handle.wait(timeout_s, min_tokens) if self._handle is not None else None

    def suspend(self) -> None:
        if self._handle is not None:
            self._retry_at[self._handle.replica] = self._clock() + UNRESPONSIVE_RETRY_S
            self._leave()

    def close(self, *, keep: bool) -> None:
        self._report()
        if self._handle is not None:
            self._handle.close(keep=keep)

    def _leave(self) -> None:
        assert self._handle is not None, "it was open"
        self._former_wire_bytes += self._handle.wire_bytes
        self._handle.close(keep=False)
        self._handle = None
