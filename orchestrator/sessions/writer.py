"""One pipeline for all sessions: what gathers while one is under way is the next.

So the cost of a round trip is shared by as many commands as there are, with no waiting for them.
Knows commands and replies, not what they mean. Bounded in commands (callers beyond wait) and in
time: while Redis is away every call fails within the link's timeouts, most at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import structlog

from orchestrator.sessions.lua import Script
from outrider.errors import InternalError, OutriderError, Unavailable
from outrider.redis.connection import Command, NoScript, RedisConnection, Reply

log = structlog.get_logger()

# A pipeline has one deadline (1 s by default); 256 commands take some 10 ms, or some 0.1 s where
# each carries a conversation of 100,000 tokens.
MAX_BATCH = 256
MAX_PENDING = 4096
# After a failure calls fail at once for so long, instead of each waiting out a timeout.
PAUSE_S = 0.25


class _PendingCommand:
    __slots__ = ("args", "keys", "reply", "script")

    def __init__(
        self, script: Script | None, keys: Command, args: Command, reply: asyncio.Future[Reply]
    ) -> None:
        self.script = script
        self.keys = keys
        self.args = args
        self.reply = reply

    def command(self, *, with_source: bool = False) -> Command:
        if self.script is None:
            return self.args
        verb, body = (b"EVAL", self.script.source) if with_source else (b"EVALSHA", self.script.sha)
        return (verb, body, b"%d" % len(self.keys), *self.keys, *self.args)


class PipelineWriter:
    """Owns one task and one Link, from start to close."""

    def __init__(self, link: RedisConnection) -> None:
        self._link = link
        self._pending: deque[_PendingCommand] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Semaphore(MAX_PENDING)
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._paused_until = 0.0
        self._failure: tuple[str, ...] = ("",)
        # Redis has not answered last time, or could not do what it was asked for.
        self.is_away = False

    @property
    def certificate_expires_at(self) -> float | None:
        """End of the certificate that Redis showed at the last connection, Unix time."""
        return self._link.certificate_expires_at

    def start(self) -> None:
        """Also once more after a close."""
        assert self._task is None, "started twice"
        self._closing = False
        self._task = asyncio.create_task(self._run(), name="store writer")

    async def close(self) -> None:
        """Writes what is pending, then stops."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            task, self._task = self._task, None
            try:
                await task
            finally:
                await self._link.close()

    async def run(self, script: Script, keys: Command, args: Command) -> Reply:
        """Its reply. Raises Unavailable; whether Redis has run it is then not known.

        A caller cancelled meanwhile does not take its command back if that is on its way.
        """
        return await self._call(script, keys, args)

    async def command(self, *args: bytes) -> Reply:
        """As `run`, for a plain command."""
        return await self._call(None, (), args)

    async def _call(self, script: Script | None, keys: Command, args: Command) -> Reply:
        async with self._room:
            loop = asyncio.get_running_loop()
            if self._closing or self._task is None or self._task.done():
                raise Unavailable("the session store is closed")
            if loop.time() < self._paused_until:
                raise Unavailable(*self._failure)
            reply: asyncio.Future[Reply] = loop.create_future()
            self._pending.append(_PendingCommand(script, keys, args, reply))
            self._wake.set()
            return await reply

    async def _run(self) -> None:
        batch: list[_PendingCommand] = []
        try:
            while self._pending or not self._closing:
                await self._wake.wait()
                batch = self._next_batch()
                if batch:
                    await self._flush(batch)
        except asyncio.CancelledError:
            self._fail([*batch, *self._pending], Unavailable("the session store has stopped"))
            raise

    def _next_batch(self) -> list[_PendingCommand]:
        batch: list[_PendingCommand] = []
        while self._pending and len(batch) < MAX_BATCH:
            call = self._pending.popleft()
            if not call.reply.done():  # else its caller has been cancelled
                batch.append(call)
        if not self._pending:
            self._wake.clear()
            if self._closing:
                self._wake.set()
        return batch

    async def _flush(self, batch: list[_PendingCommand]) -> None:
        try:
            replies = await self._link.exchange([call.command() for call in batch])
            forgotten = [i for i, r in enumerate(replies) if isinstance(r, NoScript)]
            if forgotten:  # SCRIPT FLUSH, or another server behind the address
                sources = [batch[i].command(with_source=True) for i in forgotten]
                for i, reply in zip(forgotten, await self._link.exchange(sources), strict=True):
                    replies[i] = reply
        except Unavailable as error:
            self.is_away = True
            self._failure = error.args
            self._paused_until = asyncio.get_running_loop().time() + PAUSE_S
            # Those behind would only wait for the same.
            self._fail([*batch, *self._pending], error)
            self._pending.clear()
            return
        except Exception as error:  # a defect: it is this batch's alone, and nobody is left waiting
            log.error("store_batch_failed", exc_info=error)
            self._fail(batch, Unavailable("the session store failed", repr(error)))
            return
        self.is_away = any(isinstance(reply, Unavailable) for reply in replies)
        for call, reply in zip(batch, replies, strict=True):
            _resolve(call, reply)

    def _fail(self, calls: Sequence[_PendingCommand], error: OutriderError) -> None:
        for call in calls:
            # One each: an exception collects the traceback of whoever raises it.
            _resolve(call, type(error)(*error.args))


def _resolve(call: _PendingCommand, reply: Reply | Exception) -> None:
    if call.reply.done():
        return
    if isinstance(reply, NoScript):
        reply = InternalError("a script failed in Redis", str(reply))
    if isinstance(reply, Exception):
        call.reply.set_exception(reply)
    else:
        call.reply.set_result(reply)
