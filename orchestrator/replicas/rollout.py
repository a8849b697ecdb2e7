"""Draft rollout: assigns generations to draft revisions, compares these, promotes or rolls back.

A draft revision that joins the tier becomes the canary: it gets a random share of the generations.
Its acceptance rate is compared with the current revision's, until it is promoted or rolled back.
After a promotion the former revision keeps that share for a while, as the control.
All orchestrators of a target share state and measurements through Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import structlog

from orchestrator.speculation.comparison import MIN_VERIFIED, difference_interval
from orchestrator.speculation.draft_speed import DraftSpeed, handicap
from outrider.draft_rollout import AcceptanceSums, Role, Rollout
from outrider.redis.rollout_store import RolloutStore
from outrider.settings.draft_canary import DraftCanarySettings

log = structlog.get_logger()

# The order in which revisions are used by generations that are not assigned to them, because the
# assigned one has no replica. A worse draft is better than none.
_FALLBACK = (
    Role.CURRENT, Role.CONTROL, Role.CANARY, Role.SUPERSEDED, Role.WAITING, Role.ROLLED_BACK,
)  # fmt: skip
# Compared generations of the current revision for each of the canary's or control's. Choice: more
# would hardly make the comparison shorter, and cost time where drafting does not pay.
_OTHERS_PER_TRIAL = 3
# After a promotion the former revision remains the control for this many times
# draft_canary_min_generations of its generations. Choice: long enough to notice a mistake, and soon
# all generations have the better draft.
_CONFIRM_FACTOR = 10
# Revisions that are counted for metrics.
_MAX_REVISIONS = 32
# Decisions, for metrics.
PROMOTED, CONFIRMED, ROLLED_BACK, REPLACED = "promoted", "confirmed", "rolled_back", "replaced"


@dataclass(frozen=True)
class RolloutTiming:
    """Times in seconds."""

    # Between exchanges with Redis.
    interval_s: float = 1.0
    # At the first start, revisions connect one after another: wait before one becomes the current.
    settle_s: float = 3.0
    # A revision without a connected replica for this long is gone. A replica's restart may be
    # longer; generations then use what there is.
    absent_s: float = 60.0
    # Generations move within this time, not all at once: each move processes a context again.
    spread_s: float = 5.0


@dataclass
class RevisionCounts:
    """Verified draft tokens of one revision at this orchestrator, for metrics."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0


@dataclass(frozen=True)
class Assignment:
    """Revision of one generation, by the rollout of that version. Empty: any revision.

    `is_compared`: its acceptance rate counts, so it is measured even if drafting does not pay.
    """

    revision: str = ""
    version: int = 0
    is_compared: bool = False


class DraftRollout:
    """The rollout as this orchestrator sees it. Runs on the event loop."""

    def __init__(
        self,
        num_replicas: Callable[[], Mapping[str, int]] = dict,
        settings: DraftCanarySettings | None = None,
        timing: RolloutTiming | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
        speed: Callable[[str], DraftSpeed | None] = lambda revision: None,
    ) -> None:
        """`num_replicas`: connected replicas by revision. `draw`: a random number in [0, 1).

        `speed`: measured costs with a revision's draft; None: not known.
        """
        self._settings = settings or DraftCanarySettings()
        self._timing = timing or RolloutTiming()
        self.record = Rollout()
        # Of all orchestrators.
        self.sums: Mapping[str, AcceptanceSums] = {}
        self.counts: dict[str, RevisionCounts] = {}
        self.decisions: Counter[str] = Counter(
            dict.fromkeys((PROMOTED, CONFIRMED, ROLLED_BACK, REPLACED), 0)
        )
        # Grows whenever a generation may have to use another revision.
        self.epoch = 0
        self.num_replicas = num_replicas
        self._clock = clock
        self._draw = draw
        self._speed = speed
        # Of this orchestrator, since the last exchange with Redis.
        self.unsent: dict[str, AcceptanceSums] = {}
        self._started_at = clock()
        # Replicas of each revision that are connected, and when a revision was last seen.
        self._num_replicas: Counter[str] = Counter()
        self._seen_at: dict[str, float] = {}

    def assign(self) -> Assignment:
        """The revision for a generation that starts now, or for the rest of a running one."""
        record, share = self.record, self._settings.draft_canary_share
        if not record.trial:
            return Assignment(record.current, record.version)
        drawn = self._draw()
        revision = record.trial if drawn < share else record.current
        is_compared = drawn < (1 + _OTHERS_PER_TRIAL) * share
        return Assignment(revision, record.version, is_compared)

    def rank(self, revision: str, assignment: Assignment) -> int:
        """Order in which a generation uses revisions; lower is used first."""
        if revision == assignment.revision or not assignment.revision:
            return 0
        return 1 + _FALLBACK.index(self.record.role(revision))

    def move_delay_s(self) -> float:
        """Time until a running generation moves after a change."""
        return self._draw() * self._timing.spread_s

    def count(
        self, revision: str, num_draft_tokens: int, num_accepted: int, rejected: bool
    ) -> None:
        """Counts a verified proposal for metrics."""
        counts = self.counts.setdefault(revision, RevisionCounts())
        if len(self.counts) > _MAX_REVISIONS:
            del self.counts[next(iter(self.counts))]
        counts.num_drafts += 1
        counts.num_draft_tokens += num_draft_tokens
        counts.num_accepted_tokens += num_accepted
        counts.num_rejected_tokens += rejected

    def observe(self, assignment: Assignment, num_accepted: int, num_rejected: int) -> None:
        """The verified draft tokens of a generation, or of the part of it with this assignment."""
        num_verified = num_accepted + num_rejected
        if assignment.version != self.record.version or not assignment.is_compared:
            return
        if num_verified >= MIN_VERIFIED:
            sums = self.unsent.get(assignment.revision, AcceptanceSums())
            self.unsent[assignment.revision] = sums.plus(num_accepted / num_verified)

    @contextlib.asynccontextmanager
    async def running(self, store: RolloutStore) -> AsyncIterator[None]:
        """Shares the measurements and decides, for the block. Closes the store."""
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self._run(store), name="draft rollout")
            try:
                yield
            finally:
                task.cancel()

    async def _run(self, store: RolloutStore) -> None:
        try:
            while True:
                await self.exchange(store)
                await asyncio.sleep(self._timing.interval_s)
        finally:
            await store.close()

    async def exchange(self, store: RolloutStore) -> None:
        """Notes which revisions are connected, shares the measurements, and decides."""
        self._look()
        additions, self.unsent = self.unsent, {}
        stored = await store.sync(self.record.version, additions)
        if stored is None:  # Redis is away: nothing is decided
            return
        if stored.rollout is not None and stored.version > self.record.version:
            self.adopt(stored.rollout)
        elif stored.version < self.record.version:  # Redis has lost it
            await store.replace(stored.version, self.record)
            return
        self.sums = stored.sums
        decided = self.decide()
        if decided is None:
            return
        decision, rollout = decided
        if await store.replace(self.record.version, rollout):
            if decision:
                self.decisions[decision] += 1
            self.sums = {}
            self.adopt(rollout)

    def _look(self) -> None:
        found = Counter(self.num_replicas())
        self._seen_at |= dict.fromkeys(found, self._clock())
        if found.keys() != self._num_replicas.keys():
            self.epoch += 1
        self._num_replicas = found

    def adopt(self, rollout: Rollout) -> None:
        """Follow a version of the rollout that this or another orchestrator has stored."""
        self.record = rollout
        self.unsent.clear()
        self.epoch += 1
        log.info(
            "draft_rollout",
            decision=rollout.decision,
            version=rollout.version,
            current=rollout.current,
            trial=rollout.trial,
            rolled_back=rollout.rolled_back,
        )

    def decide(self) -> tuple[str, Rollout] | None:
        """The next state of the rollout, with its decision for metrics; None: no change.

        Depends on the shared measurements, and on the replicas that this orchestrator sees.
        """
        record = self.record
        if not record.current:
            return self._first()
        if self._is_gone(record.current):
            return self._successor()
        largest = self._largest(Role.WAITING)
        if largest and (not record.trial or record.is_promoted or self._is_gone(record.trial)):
            former = record.trial if record.is_promoted else ""
            why = f"{largest} joined and is compared with {record.current}"
            return "", record.change(why, current=record.current, trial=largest, superseded=former)
        if record.trial and not record.is_promoted and self._is_gone(record.trial):
            why = f"{record.trial} has left"
            return "", record.change(why, current=record.current)
        return self._compared() if record.trial else None

    def _first(self) -> tuple[str, Rollout] | None:
        first = self._largest(Role.WAITING)
        if not first or self._clock() - self._started_at < self._timing.settle_s:
            return None
        return "", self.record.change(f"{first} is the first revision", current=first)

    def _successor(self) -> tuple[str, Rollout] | None:
        """The current revision is gone: the canary or control replaces it, otherwise any other."""
        record = self.record
        if self._num_replicas[record.trial]:
            successor = record.trial
        else:
            successor = self._largest(Role.WAITING) or self._largest(Role.SUPERSEDED)
        if not successor:
            return None
        why = f"{successor} replaces {record.current}, which has no replica"
        # If it comes back, it is compared with its successor.
        return REPLACED, record.change(
            why, current=successor, trial=record.current, is_promoted=True
        )

    def _compared(self) -> tuple[str, Rollout] | None:
        """Promotion or roll-back by the measurements."""
        record = self.record
        current, trial = (
            self.sums.get(name, AcceptanceSums()) for name in (record.current, record.trial)
        )
        if min(current.num, trial.num) < self._settings.draft_canary_min_generations:
            return None
        newer, older = (current, trial) if record.is_promoted else (trial, current)
        low, high = difference_interval(newer, older)
        names = (record.current, record.trial)
        new, old = names if record.is_promoted else names[::-1]
        reason = (
            f"acceptance rate {newer.mean:.3f} in {newer.num} generations, with {old} "
            f"{older.mean:.3f} in {older.num}; difference between {low:.3f} and {high:.3f}"
        )
        new_speed, old_speed = self._speed(new), self._speed(old)
        needed = handicap(new_speed, old_speed, older.mean)
        if needed and new_speed and old_speed:
            reason += (
                f"; by its cost {needed:+.3f} is as fast: expected "
                f"{new_speed.tokens_per_s(newer.mean):.1f} tokens/s, with {old} "
                f"{old_speed.tokens_per_s(older.mean):.1f}"
            )
        low, high = low - needed, high - needed
        if high < 0:
            why = f"{new} rolled back: {reason}"
            return ROLLED_BACK, record.change(why, current=old, rolled_back=new)
        if record.is_promoted:
            if older.num < _CONFIRM_FACTOR * self._settings.draft_canary_min_generations:
                return None
            why = f"{new} confirmed: {reason}"
            return CONFIRMED, record.change(why, current=new, superseded=old)
        if low > -self._settings.draft_canary_margin:
            why = f"{new} promoted: {reason}"
            return PROMOTED, record.change(why, current=new, trial=old, is_promoted=True)
        return None

    def _largest(self, role: Role) -> str:
        """The connected revision in a role that has the most replicas; empty: there is none."""
        names = [name for name in self._num_replicas if self.record.role(name) is role]
        return min(names, key=lambda name: (-self._num_replicas[name], name), default="")

    def _is_gone(self, revision: str) -> bool:
        seen_at = self._seen_at.get(revision, self._started_at)
        return self._clock() - seen_at > self._timing.absent_s
