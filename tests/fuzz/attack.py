"""Hostile streams at a model service, and hostile calls at an orchestrator.

Owns the connections' misuse: frames as raw bytes, streams abandoned at any moment, answers that
are not waited for. Knows nothing of what is right (`findings` does).
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from typing import Any

import grpc

from outrider.runtime.message_limits import SMALL_BYTES
from outrider.v1 import orchestrator_pb2
from tests.fuzz.bombs import bombs
from tests.fuzz.corpus import Dialect, fingerprints, oversize, session_ids
from tests.fuzz.feed import Feed, Frame
from tests.fuzz.findings import Findings
from tests.fuzz.values import SESSION_IDS

# Generous: the machine may be busy. What takes longer hangs.
HANG_S = 120.0
_OVERSIZE_CHANCE = 1 / 5_000
_BOMB_CHANCE = 1 / 1_000
# One that is small enough to be parsed, and others.
_BOMB_BYTES = (SMALL_BYTES - 64, 2 * SMALL_BYTES, 16 * SMALL_BYTES)
Code = grpc.StatusCode
_STREAM_CODES = (Code.OK, Code.CANCELLED, Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED)
_CALL_CODES = (*_STREAM_CODES, Code.NOT_FOUND, Code.ABORTED, Code.DEADLINE_EXCEEDED)


class Attack(ABC):
    """An attack: `run` sends a number of messages from `num_peers` tasks; seeded."""

    num_peers = 4

    def __init__(self, channel: Any, dialect: Dialect, seed: int, findings: Findings) -> None:
        self._channel = channel
        self._dialect = dialect
        self._findings = findings
        self._chances = [random.Random(f"{seed}/{n}") for n in range(self.num_peers)]
        self._feeds = [Feed(dialect, chance) for chance in self._chances]
        self._num_left = 0

    async def run(self, num_messages: int) -> None:
        self._num_left = num_messages
        async with asyncio.TaskGroup() as tasks:
            for feed, chance in zip(self._feeds, self._chances, strict=True):
                tasks.create_task(self._attack(feed, chance))

    async def _attack(self, feed: Feed, chance: random.Random) -> None:
        while self._num_left > 0:
            try:
                await self._episode(feed, chance)
            except TimeoutError:
                self._findings.defect(f"nothing happened for {HANG_S:g} s")

    @abstractmethod
    async def _episode(self, feed: Feed, chance: random.Random) -> None:
        """One stream, or one call."""

    def _take(self, feed: Feed) -> Frame:
        self._num_left -= 1
        frame = feed.next()
        self._findings.sent[frame.kind] += 1
        if frame.message is not None:
            self._findings.session_ids.update(session_ids(frame.message))
            self._findings.fingerprints.update(fingerprints(frame.message))
        return frame

    def _data(self, frame: Frame, chance: random.Random) -> bytes:
        """Of the frame or, now and then, of one that is too large or would become so."""
        if chance.random() < _OVERSIZE_CHANCE:
            return oversize()
        if chance.random() < _BOMB_CHANCE:
            made = bombs(self._dialect.request)
            self._findings.sent["bomb"] += 1
            return made[chance.choice(sorted(made))](chance.choice(_BOMB_BYTES))
        return frame.data


class StreamAttack(Attack):
    """Streams that live for some frames and end in any way."""

    async def _episode(self, feed: Feed, chance: random.Random) -> None:
        call = self._channel.stream_stream(self._dialect.method)()
        listening = asyncio.create_task(self._listen(call))
        try:
            async with asyncio.timeout(HANG_S):
                await self._speak(call, feed, chance, listening)
                if chance.random() < 0.5 and not listening.done():
                    await _quietly(call.done_writing())
                    await asyncio.wait([listening])
        finally:
            call.cancel()
            await listening

    async def _speak(
        self, call: Any, feed: Feed, chance: random.Random, listening: asyncio.Task[None]
    ) -> None:
        for _ in range(chance.choice((1, 3, 10, 60))):
            if self._num_left <= 0 or listening.done():
                return
            data = self._data(self._take(feed), chance)
            if not await _quietly(call.write(data)):
                return
            pause_s = chance.choice((0, 0, 0.003, 0.012))
            if pause_s:  # so that some answers come before the next frame
                await asyncio.sleep(pause_s)

    async def _listen(self, call: Any) -> None:
        try:
            async for raw in call:
                self._findings.read(self._dialect.response.FromString(raw))
        except (asyncio.CancelledError, grpc.aio.AioRpcError):
            pass
        self._findings.ended(await call.code(), await call.details(), _STREAM_CODES)


class CallAttack(Attack):
    """Generate calls that are read to their end, for some chunks, or not at all; and the others."""

    num_peers = 12

    async def _episode(self, feed: Feed, chance: random.Random) -> None:
        data, method = self._data(self._take(feed), chance), self._dialect.method
        if chance.random() < 0.15:
            name = chance.choice(("GetSession", "ListSessions", "DeleteSession", "GetModelInfo"))
            method = f"{method.rpartition('/')[0]}/{name}"
            if chance.random() < 0.7:  # the requests with a name, or a page's, are alike
                asked = orchestrator_pb2.GetSessionRequest(session_id=chance.choice(SESSION_IDS))
                data = asked.SerializeToString()
        call = self._channel.unary_stream(method)(data, timeout=chance.choice((0.05, 0.3, 1.0)))
        try:
            async with asyncio.timeout(HANG_S):
                await self._read(call, method, chance.choice((0, 1, 3, 1_000)))
        finally:
            call.cancel()
        self._findings.ended(await call.code(), await call.details(), _CALL_CODES)

    async def _read(self, call: Any, method: str, num_chunks: int) -> None:
        try:
            async for raw in call:
                if method == self._dialect.method:
                    self._findings.read(self._dialect.response.FromString(raw))
                num_chunks -= 1
                if num_chunks < 0:
                    return
        except grpc.aio.AioRpcError:
            pass
        except asyncio.CancelledError:
            if _is_cancelled():
                raise


async def _quietly(doing: Any) -> bool:
    """False where the other side has ended the stream."""
    try:
        await doing
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError, grpc.aio.UsageError):
        return False
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
        return False
    return True


def _is_cancelled() -> bool:
    """Whether it is this task that is to end, and not the call it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
