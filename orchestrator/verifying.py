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

import structlog

from orchestrator.blocks import Proposal, TargetReply
from orchestrator.place import Place
from orchestrator.pool import ReplicaPool
from orchestrator.session import GenerationState
from orchestrator.store import KvHandle
from orchestrator.target_link import TargetHandle, TargetLink
from outrider.errors import (
    InternalError,
    KVFull,
    KVLost,
    KVNeverFits,
    OutriderError,
    Unavailable,
)

log = structlog.get_logger()

# Between attempts while every replica is full or gone.
_RETRY_S = 0.2
# A replica that has lost the keys and values of one row so often does not hold them at all.
_MAX_LOST = 3
# After these the row is sent again, or elsewhere: the context is known here.
_RETRIED = (KVLost, KVFull, KVNeverFits, Unavailable, InternalError)


class Verifying:
    """Of one generation. `open_handle` opens it at a replica that holds so much of its context;
    less urgent and later ones may lose their room there to it where it is told so. `check_length`
    raises InvalidRequest where it fits no replica that there is now.

    `send` and `reply` in turn. A reply is waited for `verdict_timeout_s`, a replica `wait_s`.
    """

    def __init__(
        self,
        pool: ReplicaPool[TargetLink],
        open_handle: Callable[[TargetLink, int, bool], TargetHandle],
        check_length: Callable[[], None],
        state: GenerationState,
        kept: KvHandle | None,
        place: Place,
        *,
        verdict_timeout_s: float,
        wait_s: float,
    ) -> None:
        self._pool = pool
        self._open_handle = open_handle
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

    async def reply(self) -> TargetReply:
        """The answer to the row sent last, from whichever replica gives it.

        Where no replica has room it is waited for. Raises CapacityExceeded where too many wait
        for that already and nothing is shown yet, InvalidRequest where then no replica is large
        enough, Unavailable where none comes in time, LeaseLost, InternalError.
        """
        assert self._handle is not None, "it is open"
        try:
            reply = await self._handle.reply(self.proposal, self._verdict_timeout_s)
        except _RETRIED as error:
            with contextlib.ExitStack() as waiting:
                reply = await self._retried(error, waiting)
        if reply.is_without_drafts:
            self.proposal = None
        if self._state.counts.num_rounds == 0:
            self.num_reused = self.cached_len + reply.num_reused_tokens
        return reply

    async def _retried(self, error: OutriderError, waiting: contextlib.ExitStack) -> TargetReply:
        """Sends the row until it is answered; what it waits in is left with `waiting`.

        A failure of the replica's is retried once, at another one.
        """
        num_lost, full, is_short, has_failed = 0, set[str](), False, False
        while True:
            assert self._handle is not None, "it is open"
            if isinstance(error, InternalError):
                failing = {self._handle.replica}
                if has_failed or self._pick(failing) is None:
                    raise error
                has_failed = True
                await self._move(error, failing, preempts=False)
            elif isinstance(error, KVLost):
                num_lost += 1
                if num_lost > _MAX_LOST:
                    raise InternalError(
                        "the target keeps losing the context", str(error)
                    ) from error
                log.info("kv_lost", replica=self._handle.replica, why=str(error))
                self.num_reused = self.cached_len = 0
                self._send()
            else:
                if isinstance(error, KVNeverFits):
                    self._too_small.add(self._handle.replica)
                if isinstance(error, KVFull):
                    full.add(self._handle.replica)
                if full and not self._rooms() - full:
                    # One that has just lost its room to another does not find it free at once.
                    at_once = not is_short and not self._has_begun
                    if not is_short:
                        waiting.enter_context(
                            self._place.short_of_room(self._rooms, has_begun=self._has_begun)
                        )
                        log.info("short_of_room", why=str(error))
                    is_short = True
                    full = set(self._rooms() - await self._place.turn_for_room(at_once=at_once))
                await self._move(error, full, preempts=is_short)
            try:
                return await self._handle.reply(self.proposal, self._verdict_timeout_s)
            except _RETRIED as again:
                error = again

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
        self._handle = self._open_handle(link, kept_len, preempts)

    def _send(self) -> None:
        assert self._handle is not None, "it is open"
        context = self._state.token_ids
        if self.proposal is not None and self._link is not None and self._link.model is not None:
            self.proposal = self.proposal.head(self._link.model.max_gamma)
        self.num_context_sent = len(context) - self.cached_len
        self._handle.send_row(self.cached_len, context[self.cached_len :], self.proposal)

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
