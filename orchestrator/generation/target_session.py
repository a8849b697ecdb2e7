"""A generation's rows at the target tier: at one replica, and at another when that one is lost.

The context is the generation's own, so nothing is lost with a replica but time: the row goes out
again, with the whole context, and what it is judged by is the same. Knows no protobuf and nothing
of drafts or Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import structlog

from orchestrator.admission.ticket import AdmissionTicket
from orchestrator.generation.state import GenerationState
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetHandle, TargetLink, TargetRequest
from orchestrator.sessions import KvHandle
from orchestrator.speculation.verification import Proposal, VerifyResult
from outrider.errors import (
    InternalError,
    KVFull,
    KVLost,
    KVNeverFits,
    OutriderError,
    ReplicaLost,
    Unavailable,
)

log = structlog.get_logger()

# Between attempts while every replica is full or gone.
_RETRY_S = 0.2
# A replica that has lost the keys and values of one row so often does not hold them at all.
_MAX_LOST = 3
# A verify request during which this many replicas in a row were lost is not sent again: it may be
# what makes them fail.
MAX_LOST_REPLICAS = 3
# After these the row is sent again, or elsewhere: the context is known here.
_RETRIED = (KVLost, KVFull, KVNeverFits, Unavailable, InternalError)


@dataclass
class _VerifyAttempts:
    """What has become of one verify request so far."""

    # Replicas that have no room for it, and those that were lost while it was there.
    full: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    num_kv_lost: int = 0
    is_short: bool = False
    has_failed: bool = False

    def lost_kv(self, error: KVLost) -> None:
        """Raises InternalError where it is too often."""
        self.num_kv_lost += 1
        if self.num_kv_lost > _MAX_LOST:
            raise InternalError("the target keeps losing the context", str(error)) from error

    def lost_replica(self, replica: str, error: ReplicaLost) -> None:
        """Raises Unavailable where it is too often."""
        self.lost.append(replica)
        log.warning("verify_request_lost", replica=replica, num=len(self.lost), why=str(error))
        if len(self.lost) >= MAX_LOST_REPLICAS:
            raise Unavailable(
                f"the target was lost {len(self.lost)} times in a row at the same verify request, "
                "which is not sent again",
                f"at {', '.join(self.lost)}: {error}",
            ) from error


class TargetSession:
    """Of one generation. Call `send` and `reply` in turn.

    `kept`: where the session's KV of the turn before is, and how much of it is used. `check_length`
    raises InvalidRequest where the generation fits no replica that is connected now. A reply may
    take `verdict_timeout_s`, a free replica `wait_s`.
    """

    def __init__(
        self,
        pool: ReplicaPool[TargetLink],
        request: TargetRequest,
        state: GenerationState,
        kept: KvHandle | None,
        place: AdmissionTicket,
        *,
        check_length: Callable[[], None],
        verdict_timeout_s: float,
        wait_s: float,
    ) -> None:
        self._pool = pool
        self._request = request
        self._check_length = check_length
        self._state = state
        self._kept = kept
        self._place = place
        self._verdict_timeout_s = verdict_timeout_s
        self._wait_s = wait_s
        self._handle: TargetHandle | None = None
        self._link: TargetLink | None = None
        # What the row sent last brought, as far as its replica takes and judges it.
        self.proposal: Proposal | None = None
        self._former_wire_bytes = 0
        # Replicas that have said that it never fits.
        self._too_small: set[str] = set()
        # How much of the context the replica holds, and how much of the prompt was there before.
        self.cached_len = 0
        self.num_reused = 0
        # Context tokens of the row sent last: more than one is a prompt, or it all anew elsewhere.
        self.num_context_sent = 0

    @property
    def wire_bytes(self) -> int:
        return self._former_wire_bytes + (self._handle.wire_bytes if self._handle else 0)

    @property
    def replica(self) -> str | None:
        """Address of the replica that it is at."""
        return self._handle.replica if self._handle is not None else None

    @property
    def latency_s(self) -> float:
        """From the last row to its answer."""
        return self._handle.latency_s if self._handle else 0.0

    async def open(self) -> None:
        """Raises InvalidRequest where it fits no replica, Unavailable where none comes in time."""
        preferred = self._kept.replica if self._kept else None
        self._check_length()
        try:
            link = await self._pool.acquire(self._wait_s, preferred, self._state.max_len)
        except Unavailable:
            self._check_length()  # the larger ones may have gone meanwhile
            raise
        self._take(link)

    def send(self, proposal: Proposal | None) -> None:
        """The next row leaves at once; from a replica that is about to stop, elsewhere."""
        self.proposal = proposal
        if self._link is not None and not self._link.takes_generations:
            other = self._pick()
            if other is not None:
                self._moved(other, "it takes no generations any more")
        self._send()

    async def reply(self) -> VerifyResult:
        """The answer to the row sent last, from whichever replica gives it.

        Where no replica has room it is waited for. Raises CapacityExceeded where too many wait
        for that already and nothing is shown yet, InvalidRequest where then no replica is large
        enough, Unavailable where none comes in time or replicas are lost at this row again and
        again, LeaseLost, InternalError.
        """
        assert self._handle is not None, "it is open"
        try:
            reply = await self._handle.reply(self.proposal, self._verdict_timeout_s)
        except _RETRIED as error:
            with contextlib.ExitStack() as waiting:
                reply = await self._retried(error, waiting)
        if self.proposal is not None:
            self.proposal = self.proposal.run_without(reply.num_left_out)
        if self._state.counts.num_rounds == 0:
            self.num_reused = self.cached_len + reply.num_reused_tokens
        return reply

    async def _retried(self, error: OutriderError, waiting: contextlib.ExitStack) -> VerifyResult:
        """Sends the row until it is answered; what it waits in is left with `waiting`."""
        tries = _VerifyAttempts()
        while True:
            await self._send_again(error, tries, waiting)
            assert self._handle is not None, "it is open"
            try:
                return await self._handle.reply(self.proposal, self._verdict_timeout_s)
            except _RETRIED as again:
                error = again

    async def _send_again(
        self, error: OutriderError, tries: _VerifyAttempts, waiting: contextlib.ExitStack
    ) -> None:
        """To the same replica or to another one, as the error says.

        A failure of the replica's is retried once, at another one.
        """
        assert self._handle is not None, "it is open"
        replica = self._handle.replica
        if isinstance(error, InternalError):
            if tries.has_failed or self._pick({replica}) is None:
                raise error
            tries.has_failed = True
            await self._move(error, {replica}, preempts=False)
        elif isinstance(error, KVLost):
            tries.lost_kv(error)
            log.info("kv_lost", replica=replica, why=str(error))
            self.num_reused = self.cached_len = 0
            self._send()
        else:
            if isinstance(error, ReplicaLost):
                tries.lost_replica(replica, error)
            if isinstance(error, KVNeverFits):
                self._too_small.add(replica)
            if isinstance(error, KVFull):
                tries.full.add(replica)
            if tries.full and not self._rooms() - tries.full:
                await self._wait_for_room(error, tries, waiting)
            await self._move(error, {*tries.full, *tries.lost}, preempts=tries.is_short)

    async def _wait_for_room(
        self, error: OutriderError, tries: _VerifyAttempts, waiting: contextlib.ExitStack
    ) -> None:
        # One that has just lost its room to another does not find it free at once.
        at_once = not tries.is_short and not self._has_begun
        if not tries.is_short:
            short = self._place.short_of_room(self._rooms, has_begun=self._has_begun)
            waiting.enter_context(short)
            log.info("short_of_room", why=str(error))
        tries.is_short = True
        tries.full = set(self._rooms() - await self._place.turn_for_room(at_once=at_once))

    def committed(self, cached_len: int) -> None:
        """So many tokens of the context are held at the replica, and right."""
        self.cached_len = cached_len

    def kv(self, epoch: int) -> KvHandle | None:
        """Where the keys and values lie."""
        if self._handle is None:
            return None
        return KvHandle(self._handle.replica, epoch, self.cached_len)

    def close(self, *, keep: bool) -> None:
        if self._handle is not None:
            self._handle.close(keep=keep)

    @property
    def _has_begun(self) -> bool:
        """Its client may have seen tokens, of this call or of one that it resumes."""
        return self._state.num_output_tokens > 0

    def _rooms(self) -> frozenset[str]:
        """The replicas that could hold it, had they room now."""
        return self._pool.rooms(self._state.max_len) - self._too_small

    def _pick(self, avoid: Collection[str] = ()) -> TargetLink | None:
        return self._pool.pick(avoid={*avoid, *self._too_small}, max_len=self._state.max_len)

    def _take(self, link: TargetLink, *, preempts: bool = False) -> None:
        kept_len = 0
        if self._kept is not None and self._kept.replica == link.endpoint:
            kept_len = self._kept.cached_len
        self._link, self.cached_len = link, kept_len
        self._handle = link.open(
            self._request,
            kept_epoch=self._kept.epoch if self._kept is not None and kept_len else 0,
            preempts=preempts,
            age_s=self._place.age_s,
        )

    def _send(self) -> None:
        assert self._handle is not None, "it is open"
        context = self._state.token_ids
        if self.proposal is not None and self._link is not None and self._link.model is not None:
            self.proposal = self.proposal.head(self._link.model.max_gamma)
        self.num_context_sent = len(context) - self.cached_len
        self._handle.send_verify(self.cached_len, context[self.cached_len :], self.proposal)

    async def _move(self, error: OutriderError, avoid: Collection[str], *, preempts: bool) -> None:
        """The row goes to another replica, as soon as there is one.

        Raises InvalidRequest where it fits none and has not begun, Unavailable at the end.
        """
        give_up_at = time.monotonic() + self._wait_s
        while True:
            link = self._pick(avoid) or self._pick()
            if link is not None:
                with contextlib.suppress(Unavailable):  # gone this very moment
                    self._moved(link, str(error), preempts=preempts)
                    self._send()
                    return
            if not self._has_begun:
                self._check_length()
            if time.monotonic() > give_up_at:
                if self._pool.has_any:
                    max_len, largest = self._state.max_len, self._pool.max_len
                    why = f"no target holds {max_len} tokens now; the largest holds {largest}"
                    raise Unavailable(why) from error
                raise error
            await asyncio.sleep(_RETRY_S)

    def _moved(self, link: TargetLink, why: str, *, preempts: bool = False) -> None:
        assert self._handle is not None, "it was open"
        if not preempts:  # else it only asks again, and has said that it is short of room
            log.info("target_moved", former=self._handle.replica, replica=link.endpoint, why=why)
        self._former_wire_bytes += self._handle.wire_bytes
        self._handle.close(keep=False)
        self._kept = None
        self._take(link, preempts=preempts)
