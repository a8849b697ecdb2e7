"""Pipeline writer: sends the commands of all sessions to Redis, one pipeline at a time.

Commands that arrive while a pipeline is under way form the next one. So they share a round trip
without being delayed for it. At most MAX_PENDING commands are queued; further ones wait. While
Redis is away every command fails within the connection's timeout, most of them at once.
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

# A pipeline has one deadline (1 s by default). 256 commands take about 10 ms; if each carries a
# conversation of 100,000 tokens, about 0.1 s.
MAX_BATCH = 256
MAX_PENDING = 4096
# After a failure, commands fail at once for this long. Otherwise each would wait for its timeout.
PAUSE_S = 0.25


class _PendingCommand:
    """A script or a plain command (`script` None) whose reply is awaited."""

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
    """Owns one task and one connection, from `start` to `close`. For use on the event loop only."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._pending: deque[_PendingCommand] = deque()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(MAX_PENDING)
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._paused_until = 0.0
        self._failure: tuple[str, ...] = ("",)
        # The last exchange had no answer, or Redis could not run a command of it.
        self.is_away = False

    @property
    def certificate_expires_at(self) -> float | None:
        """End of validity of the certificate that Redis presented last, Unix time. None: no TLS."""
        return self._connection.certificate_expires_at

    def start(self) -> None:
        """Starts the task. It may be started again after `close`."""
        assert self._task is None, "started twice"
        self._closing = False
        self._task = asyncio.create_task(self._run(), name="store writer")

    async def close(self) -> None:
        """Sends pending commands, then stops."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            task, self._task = self._task, None
            try:
                await task
            finally:
                await self._connection.close()

    async def run(self, script: Script, keys: Command, args: Command) -> Reply:
        """Returns the script's reply. Raises Unavailable; the script may have run all the same.

        Cancellation does not withdraw a command that has been sent.
        """
        return await self._send(script, keys, args)

    async def command(self, *args: bytes) -> Reply:
        """Like `run`, for a plain command."""
        return await self._send(None, (), args)

    async def _send(self, script: Script | None, keys: Command, args: Command) -> Reply:
        async with self._slots:
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
            pending = self._pending.popleft()
            if not pending.reply.done():  # otherwise its task was cancelled
                batch.append(pending)
        if not self._pending:
            self._wake.clear()
            if self._closing:
                self._wake.set()
        return batch

    async def _flush(self, batch: list[_PendingCommand]) -> None:
        try:
            replies = await self._connection.exchange([pending.command() for pending in batch])
            forgotten = [i for i, r in enumerate(replies) if isinstance(r, NoScript)]
            if forgotten:  # by SCRIPT FLUSH, or by another server behind the address
                sources = [batch[i].command(with_source=True) for i in forgotten]
                again = await self._connection.exchange(sources)
                for i, reply in zip(forgotten, again, strict=True):
                    replies[i] = reply
        except Unavailable as error:
            self.is_away = True
            self._failure = error.args
            self._paused_until = asyncio.get_running_loop().time() + PAUSE_S
            # Queued commands would only wait for the same failure.
            self._fail([*batch, *self._pending], error)
            self._pending.clear()
            return
        except Exception as error:  # a defect: it fails this batch only, and no task waits forever
            log.error("store_batch_failed", exc_info=error)
            self._fail(batch, Unavailable("the session store failed", repr(error)))
            return
        self.is_away = any(isinstance(reply, Unavailable) for reply in replies)
        for pending, reply in zip(batch, replies, strict=True):
            _resolve(pending, reply)

    def _fail(self, batch: Sequence[_PendingCommand], error: OutriderError) -> None:
        for pending in batch:
            # One error for each task: raising an exception adds to its traceback.
            _resolve(pending, type(error)(*error.args))


def _resolve(pending: _PendingCommand, reply: Reply | Exception) -> None:
    if pending.reply.done():
        return
    if isinstance(reply, NoScript):
        reply = InternalError("a script failed in Redis", str(reply))
    if isinstance(reply, Exception):
        pending.reply.set_exception(reply)
    else:
        pending.reply.set_result(reply)
