"""A generation's rows at the target tier: at one replica, and at another when that one is lost.

The context is the generation's own, so nothing is lost with a replica but time: the row goes out
again, with the whole context, and what it is judged by is the same. Knows no protobuf and nothing
of drafts or Redis.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from orchestrator.blocks import Proposal, TargetReply
from orchestrator.pool import ReplicaPool
from orchestrator.session import GenerationState
from orchestrator.store import KvHandle
from orchestrator.target_link import TargetHandle, TargetLink
from outrider.errors import InternalError, KVFull, KVLost, Unavailable

log = structlog.get_logger()

# Between attempts while every replica is full or gone.
_RETRY_S = 0.2
# A replica that has lost the keys and values of one row so often does not hold them at all.
_MAX_LOST = 3


class Verifying:
    """Of one generation. `open_handle` opens it at a replica that holds so much of its context.

    `send` and `reply` in turn. A reply is waited for `verdict_timeout_s`, a replica `wait_s`.
    """

    def __init__(
        self,
        pool: ReplicaPool[TargetLink],
        open_handle: Callable[[TargetLink, int], TargetHandle],
        state: GenerationState,
        kept: KvHandle | None,
        *,
        verdict_timeout_s: float,
        wait_s: float,
    ) -> None:
        self._pool = pool
        self._open_handle = open_handle
        self._state = state
        self._kept = kept
        self._verdict_timeout_s = verdict_timeout_s
        self._wait_s = wait_s
        self._handle: TargetHandle | None = None
        self._link: TargetLink | None = None
        self._proposal: Proposal | None = None
        self._former_wire_bytes = 0
        # How much of the context the replica holds, and how much of the prompt was there before.
        self.cached_len = 0
        self.num_reused = 0

    @property
    def wire_bytes(self) -> int:
        return self._former_wire_bytes + (self._handle.wire_bytes if self._handle else 0)

    @property
    def latency_s(self) -> float:
        """From the last row to its answer."""
        return self._handle.latency_s if self._handle else 0.0

    async def open(self) -> None:
        """Raises Unavailable where no replica comes within `wait_s`."""
        preferred = self._kept.replica if self._kept else None
        self._take(await self._pool.acquire(self._wait_s, preferred))

    def send(self, proposal: Proposal | None) -> None:
        """The next row leaves at once; from a replica that is about to stop, elsewhere."""
        self._proposal = proposal
        if self._link is not None and not self._link.takes_generations:
            other = self._pool.pick()
            if other is not None:
                self._moved(other, "it takes no generations any more")
        self._send()

    async def reply(self) -> TargetReply:
        """The answer to the row sent last, from whichever replica gives it.

        Raises KVFull where no replica has room for the first row, Unavailable where none comes
        in time, LeaseLost, InvalidRequest, InternalError.
        """
        num_lost, give_up_at, full = 0, 0.0, set[str]()
        while True:
            assert self._handle is not None, "it is open"
            try:
                reply = await self._handle.reply(self._proposal, self._verdict_timeout_s)
            except KVLost as error:
                num_lost += 1
                if num_lost > _MAX_LOST:
                    raise InternalError(f"the target keeps losing the context: {error}") from error
                log.info("kv_lost", replica=self._handle.replica, why=str(error))
                self.num_reused = self.cached_len = 0
                self._send()
                continue
            except (Unavailable, KVFull) as error:
                now = time.monotonic()
                give_up_at = give_up_at or now + self._wait_s
                if isinstance(error, KVFull):
                    full.add(self._handle.replica)
                await self._move(error, full, give_up_at)
                continue
            if self._state.counts.num_rounds == 0:
                self.num_reused = self.cached_len + reply.num_reused_tokens
            return reply

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

    def _take(self, link: TargetLink) -> None:
        kept_len = 0
        if self._kept is not None and self._kept.replica == link.endpoint:
            kept_len = self._kept.cached_len
        self._link, self.cached_len = link, kept_len
        self._handle = self._open_handle(link, kept_len)

    def _send(self) -> None:
        assert self._handle is not None, "it is open"
        context = self._state.token_ids
        self._handle.send_row(self.cached_len, context[self.cached_len :], self._proposal)

    async def _move(self, error: Unavailable | KVFull, full: set[str], give_up_at: float) -> None:
        """The row goes to another replica, as soon as there is one. Raises `error` at the end."""
        while True:
            link = self._pool.pick(avoid=full)
            if link is None and full:
                if self._state.counts.num_rounds == 0:
                    raise error  # not begun: the caller had better come back later
                full.clear()
            elif link is not None:
                try:
                    self._moved(link, str(error))
                except Unavailable:  # gone this very moment
                    continue
                self._send()
                return
            if time.monotonic() > give_up_at:
                raise error
            await asyncio.sleep(_RETRY_S)

    def _moved(self, link: TargetLink, why: str) -> None:
        assert self._handle is not None, "it was open"
        log.info("target_moved", former=self._handle.replica, replica=link.endpoint, why=why)
        self._former_wire_bytes += self._handle.wire_bytes
        self._handle.close(keep=False)
        self._kept = None
        self._take(link)
