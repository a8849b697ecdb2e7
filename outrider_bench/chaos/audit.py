"""What came of the streams, held against what they must be and against what Redis has.

Owns the verdict on a stream once its caller is done with it. Knows no fault but whether Redis was
away meanwhile, which is asked of `Excuse`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from outrider.v1 import orchestrator_pb2
from outrider_bench.chaos.calls import Orchestrators
from outrider_bench.chaos.client import Excuse, Stream
from outrider_bench.chaos.expected import Reference

# A lease that nobody gives back lapses after 10 s (orchestrator.sessions).
_SETTLE_TIMEOUT_S = 25.0
_CALL_TIMEOUT_S = 10.0
_POLL_S = 0.25
_MAX_CONCURRENT = 8


class Audit:
    """For a system that is whole again."""

    def __init__(self, orchestrators: Orchestrators, reference: Reference, excuse: Excuse) -> None:
        self._orchestrators = orchestrators
        self._reference = reference
        self._excuse = excuse
        self._room = asyncio.Semaphore(_MAX_CONCURRENT)
        # Outputs that Redis does not have, as it was away: said so in their result.
        self.num_unrecorded = 0

    async def judge(self, streams: Sequence[Stream], on_judged: Callable[[], None]) -> None:
        """Adds to their `problems`, and deletes their sessions."""

        async def judge(stream: Stream) -> None:
            async with self._room:
                stream.problems += [what for what in await self._judge(stream) if what]
                await self._delete(stream)
            on_judged()

        async with asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(judge(stream))

    async def _judge(self, stream: Stream) -> list[str]:
        finish = stream.result.finish_reason if stream.result is not None else None
        wrong = await self._reference.difference(stream.job, stream.token_ids, finish)
        if wrong:
            return [wrong]
        if stream.is_session_shared or stream.is_lost_to_redis:
            return []
        return [await self._session(stream)]

    async def _session(self, stream: Stream) -> str:
        """What is wrong with the session in Redis; empty: nothing."""
        session = await self._settled(stream)
        if isinstance(session, str):
            return session if stream.token_ids else ""
        prompt = list(stream.job.case.prompt_ids)
        recorded, shown = list(session.token_ids), prompt + stream.token_ids
        if stream.result is not None:
            return "" if recorded == shown else self._excused(stream, recorded, shown)
        # Its caller has left: what was shown is there, and what came behind it is right.
        if recorded[: len(shown)] != shown:
            return self._excused(stream, recorded, shown)
        output = recorded[len(prompt) :]
        behind = await self._reference.difference(stream.job, output, None)
        return f"in Redis, behind what was shown: {behind}" if behind else ""

    def _excused(self, stream: Stream, recorded: list[int], shown: list[int]) -> str:
        """Tokens shown while Redis was away may be missing there, but never be others."""
        said = stream.result is None or not stream.result.recorded
        if said and recorded == shown[: len(recorded)] and self._excuse.redis(stream.began_at):
            self.num_unrecorded += 1
            return ""
        at = next((i for i, (a, b) in enumerate(zip(recorded, shown, strict=False)) if a != b), -1)
        where = f"different from token {at} of the context on" if at >= 0 else "a beginning of it"
        return f"Redis has {len(recorded)} tokens, its caller {len(shown)}: {where}"

    async def _settled(self, stream: Stream) -> orchestrator_pb2.GetSessionResponse | str:
        """The session once nobody holds it any more, or why it cannot be had."""
        deadline, why = time.monotonic() + _SETTLE_TIMEOUT_S, ""
        number = stream.orchestrator
        request = orchestrator_pb2.GetSessionRequest(session_id=stream.job.session_id)
        while time.monotonic() < deadline:
            try:
                stub = self._orchestrators[number]
                session: orchestrator_pb2.GetSessionResponse = await stub.GetSession(
                    request, timeout=_CALL_TIMEOUT_S
                )
                if not session.in_use:
                    return session
                why = "its session is still held"
            except grpc.aio.AioRpcError as error:
                why = f"its session cannot be had: {error.code().name}: {error.details()}"
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return why
            number = self._orchestrators.after(number)
            await asyncio.sleep(_POLL_S)
        return why

    async def _delete(self, stream: Stream) -> None:
        request = orchestrator_pb2.DeleteSessionRequest(session_id=stream.job.session_id)
        with contextlib.suppress(grpc.aio.AioRpcError):  # it expires by itself
            await self._orchestrators[stream.orchestrator].DeleteSession(
                request, timeout=_CALL_TIMEOUT_S
            )


async def still_open(loads: Sequence[Callable[[], Awaitable[Any]]]) -> list[int]:
    """How many generations each replica still has open, when no caller is left: none, in time.

    `loads` ask each replica for its TargetLoad or DraftLoad.
    """
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        counts = [(await load()).num_open_generations for load in loads]
        if not any(counts) or time.monotonic() > deadline:
            return counts
        await asyncio.sleep(_POLL_S)
