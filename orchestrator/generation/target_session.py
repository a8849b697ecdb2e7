"""Target session of a generation: sends its verify requests to a replica of the target tier.

If the replica is lost or full, the session moves to another one and sends the request again with
the whole context, which the generation keeps. The result does not depend on the replica. The wire
format is in `orchestrator.replicas.target_client`.
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

# Interval between attempts while all replicas are full or unreachable.
_RETRY_S = 0.2
# A replica that loses the KV of one verify request more often than this does not store it at all.
_MAX_LOST = 3
# A verify request during which this many replicas in a row were lost is not sent again: it may be
# the cause.
MAX_LOST_REPLICAS = 3
# After these errors the verify request is sent again, to the same replica or to another one.
_RETRIED = (KVLost, KVFull, KVNeverFits, Unavailable, InternalError)


@dataclass
class _VerifyAttempts:
    """Failed attempts of one verify request."""

    # Replicas without room for it.
    full: set[str] = field(default_factory=set)
    # Replicas that were lost during it.
    lost: list[str] = field(default_factory=list)
    num_kv_lost: int = 0
    # Whether it has been short of room.
    is_short: bool = False
    # Whether a forward pass has failed.
    has_failed: bool = False

    def lost_kv(self, error: KVLost) -> None:
        """Counts a lost KV cache. Raises InternalError if it is lost too often."""
        self.num_kv_lost += 1
        if self.num_kv_lost > _MAX_LOST:
            raise InternalError("the target keeps losing the KV cache", str(error)) from error

    def lost_replica(self, replica: str, error: ReplicaLost) -> None:
        """Counts a lost replica. Raises Unavailable after `MAX_LOST_REPLICAS`."""
        self.lost.append(replica)
        log.warning("verify_request_lost", replica=replica, num=len(self.lost), why=str(error))
        if len(self.lost) >= MAX_LOST_REPLICAS:
            raise Unavailable(
                f"the target was lost {len(self.lost)} times in a row at the same verify request, "
                "which is not sent again",
                f"at {', '.join(self.lost)}: {error}",
            ) from error


class TargetSession:
    """Target session of one generation. `open` it, then call `send` and `reply` in turn.

    `previous_kv`: replica with the KV of the session's previous turn, and its usable length.
    `check_length` raises InvalidRequest if the generation fits no connected replica.
    `verify_timeout_s`: longest wait for a reply; `wait_s`: longest wait for a replica.
    """

    def __init__(
        self,
        pool: ReplicaPool[TargetLink],
        request: TargetRequest,
        state: GenerationState,
        previous_kv: KvHandle | None,
        ticket: AdmissionTicket,
        *,
        check_length: Callable[[], None],
        verify_timeout_s: float,
        wait_s: float,
    ) -> None:
        self._pool = pool
        self._request = request
        self._check_length = check_length
        self._state = state
        self._previous_kv = previous_kv
        self._ticket = ticket
        self._verify_timeout_s = verify_timeout_s
        self._wait_s = wait_s
        # Their pass needs the whole prompt: no KV of an earlier turn is used.
        self._scores_prompt = request.params.prompt_logprobs is not None
        self._handle: TargetHandle | None = None
        self._link: TargetLink | None = None
        # Proposal of the last verify request, cut to the tokens that its replica verifies.
        self.proposal: Proposal | None = None
        self._former_wire_bytes = 0
        # Replicas that reported that the generation never fits.
        self._too_small: set[str] = set()
        # Tokens of the context in the replica's KV cache.
        self.cached_len = 0
        # Prompt tokens whose KV was already there.
        self.num_reused = 0
        # Context tokens of the last verify request: more than one for a prompt or after a move.
        self.num_context_sent = 0

    @property
    def wire_bytes(self) -> int:
        """Bytes of this session's messages, both directions, all replicas."""
        return self._former_wire_bytes + (self._handle.wire_bytes if self._handle else 0)

    @property
    def replica(self) -> str | None:
        """Address of the current replica; None before `open`."""
        return self._handle.replica if self._handle is not None else None

    @property
    def latency_s(self) -> float:
        """Seconds from the last verify request to its result."""
        return self._handle.latency_s if self._handle else 0.0

    async def open(self) -> None:
        """Picks a replica.

        Raises InvalidRequest if the generation fits none, Unavailable if none is free in time.
        """
        preferred = self._previous_kv.replica if self._previous_kv else None
        self._check_length()
        try:
            link = await self._pool.acquire(self._wait_s, preferred, self._state.max_len)
        except Unavailable:
            self._check_length()  # larger replicas may have disconnected meanwhile
            raise
        self._take(link)

    def send(self, proposal: Proposal | None) -> None:
        """Sends the next verify request at once; moves first if the replica is draining."""
        self.proposal = proposal
        if self._link is not None and not self._link.takes_generations:
            other = self._pick()
            if other is not None:
                self._move_to(other, "it takes no more generations")
        self._send()

    async def reply(self) -> VerifyResult:
        """Awaits the result of the last verify request; retries, moves or waits for room if needed.

        Raises CapacityExceeded if too many generations wait for room and no token was sent yet;
        InvalidRequest if no replica is large enough any more; Unavailable if no replica becomes
        free in time, or several in a row were lost; LeaseLost; InternalError.
        """
        assert self._handle is not None, "the session is open"
        try:
            reply = await self._handle.reply(self.proposal, self._verify_timeout_s)
        except _RETRIED as error:
            with contextlib.ExitStack() as waiting:
                reply = await self._retried(error, waiting)
        if self.proposal is not None:
            self.proposal = self.proposal.run_without(reply.num_left_out)
        if self._state.counts.num_rounds == 0:
            self.num_reused = self.cached_len + reply.num_reused_tokens
        return reply

    async def _retried(self, error: OutriderError, waiting: contextlib.ExitStack) -> VerifyResult:
        """Sends the verify request again until it succeeds. `waiting` gets the wait for room."""
        attempts = _VerifyAttempts()
        while True:
            await self._send_again(error, attempts, waiting)
            assert self._handle is not None, "the session is open"
            try:
                return await self._handle.reply(self.proposal, self._verify_timeout_s)
            except _RETRIED as again:
                error = again

    async def _send_again(
        self, error: OutriderError, attempts: _VerifyAttempts, waiting: contextlib.ExitStack
    ) -> None:
        """Sends the request again: to the same replica after KVLost, otherwise to another one.

        A failed forward pass is retried once, at another replica.
        """
        assert self._handle is not None, "the session is open"
        replica = self._handle.replica
        if isinstance(error, InternalError):
            if attempts.has_failed or self._pick({replica}) is None:
                raise error
            attempts.has_failed = True
            await self._move(error, {replica}, preempts=False)
        elif isinstance(error, KVLost):
            attempts.lost_kv(error)
            log.info("kv_lost", replica=replica, why=str(error))
            self.num_reused = self.cached_len = 0
            self._send()
        else:
            if isinstance(error, ReplicaLost):
                attempts.lost_replica(replica, error)
            if isinstance(error, KVNeverFits):
                self._too_small.add(replica)
            if isinstance(error, KVFull):
                attempts.full.add(replica)
            if attempts.full and not self._fitting_targets() - attempts.full:
                await self._wait_for_room(error, attempts, waiting)
            await self._move(error, {*attempts.full, *attempts.lost}, preempts=attempts.is_short)

    async def _wait_for_room(
        self, error: OutriderError, attempts: _VerifyAttempts, waiting: contextlib.ExitStack
    ) -> None:
        # A generation that was just preempted does not find room at once.
        at_once = not attempts.is_short and not self._has_begun
        if not attempts.is_short:
            short = self._ticket.short_of_room(self._fitting_targets, has_begun=self._has_begun)
            waiting.enter_context(short)
            log.info("short_of_room", why=str(error))
        attempts.is_short = True
        attempts.full = set(
            self._fitting_targets() - await self._ticket.turn_for_room(at_once=at_once)
        )

    def committed(self, cached_len: int) -> None:
        """Sets how many tokens of the context are committed and in the replica's KV cache."""
        self.cached_len = cached_len

    def kv(self, epoch: int) -> KvHandle | None:
        """Handle of the KV cache, to be stored with the session; None before `open`."""
        if self._handle is None:
            return None
        return KvHandle(self._handle.replica, epoch, self.cached_len)

    def close(self, *, keep: bool) -> None:
        """Closes the session. `keep`: the replica keeps its KV for the next turn."""
        if self._handle is not None:
            self._handle.close(keep=keep)

    @property
    def _has_begun(self) -> bool:
        """Whether the client may have received tokens, also of a request that this one resumes."""
        return self._state.num_output_tokens > 0

    def _fitting_targets(self) -> frozenset[str]:
        """Replicas whose KV cache is large enough, whether or not they have room now."""
        return self._pool.candidates(self._state.max_len) - self._too_small

    def _pick(self, avoid: Collection[str] = ()) -> TargetLink | None:
        return self._pool.pick(avoid={*avoid, *self._too_small}, max_len=self._state.max_len)

    def _take(self, link: TargetLink, *, preempts: bool = False) -> None:
        previous, cached_len = self._previous_kv, 0
        if previous is not None and previous.replica == link.endpoint:
            cached_len = previous.cached_len
        self._link, self.cached_len = link, cached_len
        self._handle = link.open(
            self._request,
            kept_epoch=previous.epoch if previous is not None and cached_len else 0,
            preempts=preempts,
            age_s=self._ticket.age_s,
        )

    def _send(self) -> None:
        assert self._handle is not None, "the session is open"
        context = self._state.token_ids
        if self.proposal is not None and self._link is not None and self._link.model is not None:
            self.proposal = self.proposal.head(self._link.model.max_gamma)
        self.num_context_sent = len(context) - self.cached_len
        self._handle.send_verify(
            self.cached_len,
            context[self.cached_len :],
            self.proposal,
            with_prompt_logprobs=self._scores_prompt and not self._state.num_output_tokens,
        )

    async def _move(self, error: OutriderError, avoid: Collection[str], *, preempts: bool) -> None:
        """Moves to another replica and sends the request; waits up to `wait_s` for one.

        Raises InvalidRequest if the generation fits none and has not begun. Raises Unavailable or
        `error` after the wait.
        """
        give_up_at = time.monotonic() + self._wait_s
        while True:
            link = self._pick(avoid) or self._pick()
            if link is not None:
                with contextlib.suppress(Unavailable):  # it has just disconnected
                    self._move_to(link, str(error), preempts=preempts)
                    self._send()
                    return
            if not self._has_begun:
                self._check_length()
            if time.monotonic() > give_up_at:
                if self._pool.has_any:
                    max_len, largest = self._state.max_len, self._pool.max_len
                    why = f"no target has a KV cache for {max_len} tokens; the largest: {largest}"
                    raise Unavailable(why) from error
                raise error
            await asyncio.sleep(_RETRY_S)

    def _move_to(self, link: TargetLink, why: str, *, preempts: bool = False) -> None:
        assert self._handle is not None, "the session is open"
        if not preempts:  # otherwise it only asks again for room, which is logged already
            log.info("target_moved", former=self._handle.replica, replica=link.endpoint, why=why)
        self._former_wire_bytes += self._handle.wire_bytes
        self._handle.close(keep=False)
        self._previous_kv = None
        self._take(link, preempts=preempts)
