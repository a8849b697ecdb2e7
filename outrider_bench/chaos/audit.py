"""Audit of the streams: compares them with the reference outputs and with the sessions in Redis.

`FaultHistory` decides whether a Redis fault explains a difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from outrider.v1 import orchestrator_pb2
from outrider_bench.chaos.calls import OrchestratorStubs
from outrider_bench.chaos.client import FaultHistory, Stream
from outrider_bench.chaos.reference import Reference

# An unreleased lease expires after 10 s (orchestrator.sessions).
_RELEASE_TIMEOUT_S = 25.0
_CALL_TIMEOUT_S = 10.0
_POLL_S = 0.25
_MAX_CONCURRENT = 8


class StreamAudit:
    """Audits streams after the load has ended and all faults are over."""

    def __init__(
        self, orchestrators: OrchestratorStubs, reference: Reference, faults: FaultHistory
    ) -> None:
        self._orchestrators = orchestrators
        self._reference = reference
        self._faults = faults
        self._semaphore = asyncio.Semaphore(_MAX_CONCURRENT)
        # Outputs missing in Redis because it was unreachable; their results report it.
        self.num_unrecorded = 0

    async def run(self, streams: Sequence[Stream], on_audited: Callable[[], None]) -> None:
        """Adds to the streams' `problems` and deletes their sessions."""

        async def audit(stream: Stream) -> None:
            async with self._semaphore:
                stream.problems += [what for what in await self._problems(stream) if what]
                await self._delete(stream)
            on_audited()

        async with asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(audit(stream))

    async def _problems(self, stream: Stream) -> list[str]:
        finish = stream.result.finish_reason if stream.result is not None else None
        problem = await self._reference.difference(stream.job, stream.token_ids, finish)
        if problem:
            return [problem]
        if stream.is_session_shared or stream.is_not_resumable:
            return []
        return [await self._session_problem(stream)]

    async def _session_problem(self, stream: Stream) -> str:
        """Problem of the session in Redis; empty: none."""
        session = await self._released_session(stream)
        if isinstance(session, str):
            return session if stream.token_ids else ""
        prompt = list(stream.job.case.prompt_ids)
        recorded, received = list(session.token_ids), prompt + stream.token_ids
        if stream.result is not None:
            return (
                "" if recorded == received else self._recording_problem(stream, recorded, received)
            )
        # The client disconnected: Redis must have what it received; the rest must match the
        # reference.
        if recorded[: len(received)] != received:
            return self._recording_problem(stream, recorded, received)
        output = recorded[len(prompt) :]
        difference = await self._reference.difference(stream.job, output, None)
        return f"in Redis, after the tokens received: {difference}" if difference else ""

    def _recording_problem(self, stream: Stream, recorded: list[int], received: list[int]) -> str:
        """Problem of a session that differs from what the client received; empty: none.

        Tokens sent while Redis was unreachable may be missing in it, but never differ.
        """
        is_reported = stream.result is None or not stream.result.recorded
        if (
            is_reported
            and recorded == received[: len(recorded)]
            and self._faults.redis_was_faulted(stream.began_at)
        ):
            self.num_unrecorded += 1
            return ""
        at = next(
            (i for i, (a, b) in enumerate(zip(recorded, received, strict=False)) if a != b), -1
        )
        where = f"they differ at token {at} of the context" if at >= 0 else "one is a prefix"
        return f"Redis has {len(recorded)} tokens, the client {len(received)}: {where}"

    async def _released_session(self, stream: Stream) -> orchestrator_pb2.GetSessionResponse | str:
        """The session, once its lease is released; otherwise the problem."""
        deadline, problem = time.monotonic() + _RELEASE_TIMEOUT_S, ""
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
                problem = "the session's lease is not released"
            except grpc.aio.AioRpcError as error:
                problem = f"GetSession failed: {error.code().name}: {error.details()}"
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return problem
            number = self._orchestrators.after(number)
            await asyncio.sleep(_POLL_S)
        return problem

    async def _delete(self, stream: Stream) -> None:
        request = orchestrator_pb2.DeleteSessionRequest(session_id=stream.job.session_id)
        with contextlib.suppress(grpc.aio.AioRpcError):  # it expires anyway
            await self._orchestrators[stream.orchestrator].DeleteSession(
                request, timeout=_CALL_TIMEOUT_S
            )


async def open_generation_counts(loads: Sequence[Callable[[], Awaitable[Any]]]) -> list[int]:
    """Number of open generations of each replica: zero, or the counts after the timeout.

    Call it once no client is left. `loads` return the TargetLoad or DraftLoad of each replica.
    """
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while True:
        counts = [(await load()).num_open_generations for load in loads]
        if not any(counts) or time.monotonic() > deadline:
            return counts
        await asyncio.sleep(_POLL_S)
