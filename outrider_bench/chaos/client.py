"""Client of one generation: follows it to its end and resumes it on whichever orchestrator serves.

Owns what the client received, when, and whether a call may have failed as it did. `FaultHistory`
decides whether a fault explains a failure. `audit` compares the tokens with the reference.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from outrider.v1 import orchestrator_pb2
from outrider_bench.chaos.calls import GENERATION_TIMEOUT_S, Attempt, OrchestratorStubs
from outrider_bench.chaos.jobs import ClientBehaviour, Job

_RETRY_S = 0.1

_Code = grpc.StatusCode
# Statuses of a request to an orchestrator that a fault ended. CANCELLED: from gRPC's core, for
# requests that arrive while the server stops.
_BROKEN = (_Code.UNAVAILABLE, _Code.ABORTED, _Code.CANCELLED)


class FaultHistory(Protocol):
    """Whether a fault of an orchestrator or of Redis was active at or after `since`.

    Times are of time.monotonic().
    """

    def orchestrator_was_faulted(self, number: int, since: float) -> bool: ...
    def redis_was_faulted(self, since: float) -> bool: ...


@dataclass(eq=False)
class Stream:
    """One generation as its client received it. `problems`: what must not happen, as messages."""

    job: Job
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    orchestrator: int = 0
    began_at: float = 0.0
    ended_at: float | None = None
    result: orchestrator_pb2.GenerateResult | None = None
    problems: list[str] = field(default_factory=list)
    num_resumed: int = 0
    # Calls that an orchestrator refused before they began. The client repeated them.
    num_refused: int = 0
    # Calls refused because another call has the session: the second of two clients, or one
    # overtaken by an earlier resumption that was thought lost and arrived late.
    num_fenced: int = 0
    # A resuming call was lost without an answer; it may still take over the session.
    has_stray_call: bool = False
    # Seconds from a resuming call to its first token.
    resume_waits_s: list[float] = field(default_factory=list)
    # The stream cannot be resumed because Redis was unreachable when its client left; documented.
    is_not_resumable: bool = False
    # A second client may have added a turn of its own to the session.
    is_session_shared: bool = False

    @property
    def is_abandoned(self) -> bool:
        """Whether the client disconnected for good."""
        return self.job.behaviour is ClientBehaviour.ABANDONS and self.result is None

    @property
    def needs_resume(self) -> bool:
        """Whether the output is incomplete and the client still wants it."""
        is_over = self.result is not None or self.is_not_resumable or bool(self.problems)
        return not is_over and not self.is_abandoned

    def merge(self, attempt: Attempt, num_received: int) -> None:
        """Adds the tokens that a call sent after the first `num_received`.

        Tokens that another call has already sent must agree.
        """
        received = self.token_ids[num_received:]
        shared = min(len(received), len(attempt.token_ids))
        if received[:shared] != attempt.token_ids[:shared]:
            self.problems.append(f"two calls were sent different tokens after token {num_received}")
        self.token_ids += attempt.token_ids[shared:]
        self.times = sorted(self.times + attempt.times)
        if attempt.is_finished:
            self.result = attempt.result

    def note_resumption(self, attempt: Attempt) -> None:
        """Counts a resuming call that sent tokens, and its wait for the first one."""
        if attempt.times:
            self.num_resumed += 1
            self.resume_waits_s.append(attempt.times[0] - attempt.began_at)


class ResumingClient:
    """Runs generations to their end, resuming broken streams. One instance serves a whole run."""

    def __init__(self, orchestrators: OrchestratorStubs, faults: FaultHistory) -> None:
        self._orchestrators = orchestrators
        self._faults = faults

    async def run(self, stream: Stream) -> None:
        """Runs one generation until it ends or its client leaves. Notes problems; raises none."""
        job = stream.job
        stream.orchestrator, stream.began_at = job.first_orchestrator, time.monotonic()
        try:
            if job.behaviour is ClientBehaviour.ASKS_TWICE:
                await self._request_twice(stream)
            else:
                attempt = await self._call(stream, job.request(), 0, job.disconnects_at)
                if attempt.has_disconnected and job.behaviour is ClientBehaviour.RESUMES_TWICE:
                    await self._resume_twice(stream)
            while stream.needs_resume:
                if time.monotonic() > stream.began_at + GENERATION_TIMEOUT_S:
                    stream.problems.append(f"not finished within {GENERATION_TIMEOUT_S:g} s")
                    return
                await self._resume(stream)
        finally:
            stream.ended_at = time.monotonic()

    async def _resume(self, stream: Stream) -> None:
        """Resumes once, on the next orchestrator; starts again if nothing was recorded."""
        stream.orchestrator = self._orchestrators.after(stream.orchestrator)
        num_received = len(stream.token_ids)
        attempt = await self._call(stream, stream.job.resume_request(num_received), num_received)
        if attempt.code is _Code.NOT_FOUND and not num_received:
            attempt = await self._call(stream, stream.job.request(), 0)
        else:
            stream.note_resumption(attempt)
        if not attempt.token_ids:
            await asyncio.sleep(_RETRY_S)

    async def _call(
        self,
        stream: Stream,
        request: orchestrator_pb2.GenerateRequest,
        num_received: int,
        disconnects_at: int | None = None,
    ) -> Attempt:
        """Makes one call, merges its tokens and checks how it ended."""
        attempt = Attempt(stream.orchestrator, time.monotonic())
        await self._orchestrators.call(attempt, request, disconnects_at)
        stream.merge(attempt, num_received)
        self._check_end(stream, attempt, num_received)
        if (
            not attempt.is_finished
            and not attempt.is_from_server
            and request.HasField("resume_from")
        ):
            stream.has_stray_call = True
        return attempt

    async def _request_twice(self, stream: Stream) -> None:
        """Sends the request to two orchestrators. One gets the session; the other must refuse."""
        request = stream.job.request()
        first, second = await self._call_both(stream, request)
        if first.overlaps(second):
            stream.problems.append("two clients were served at once in one session")
        winner, loser = served_then_refused(first, second)
        stream.orchestrator = winner.orchestrator
        stream.merge(winner, 0)
        self._check_end(stream, winner, 0)
        self._check_rival(stream, loser, 0)

    async def _resume_twice(self, stream: Stream) -> None:
        """Resumes on two orchestrators. Both may send tokens; the overtaken one is ABORTED."""
        num_received = len(stream.token_ids)
        attempts = await self._call_both(stream, stream.job.resume_request(num_received))
        for attempt in sorted(attempts, key=lambda a: len(a.token_ids), reverse=True):
            stream.merge(attempt, num_received)
            stream.note_resumption(attempt)
            self._check_rival(stream, attempt, num_received)

    async def _call_both(
        self, stream: Stream, request: orchestrator_pb2.GenerateRequest
    ) -> tuple[Attempt, Attempt]:
        """Makes the same call on two orchestrators. Cancels the other when one has finished."""
        numbers = (stream.orchestrator, self._orchestrators.after(stream.orchestrator))
        attempts = [Attempt(number, time.monotonic()) for number in numbers]
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(self._orchestrators.call(a, request)) for a in attempts]
            waiting = set(calls)
            while waiting and not any(attempt.is_finished for attempt in attempts):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for call, attempt in zip(calls, attempts, strict=True):
                attempt.has_disconnected = call in waiting
                call.cancel()
        return attempts[0], attempts[1]

    def _check_rival(self, stream: Stream, attempt: Attempt, num_received: int) -> None:
        """Checks how the other of two concurrent calls ended."""
        if attempt.code is _Code.ABORTED:
            stream.num_fenced += 1
        elif attempt.has_disconnected or attempt.is_finished:
            stream.is_session_shared = stream.job.behaviour is ClientBehaviour.ASKS_TWICE
        else:
            self._check_end(stream, attempt, num_received)

    def _check_end(self, stream: Stream, attempt: Attempt, num_received: int) -> None:
        """Checks how a call ended. Only a fault of its orchestrator may break a stream."""
        if attempt.is_finished or attempt.has_disconnected:
            return
        redis_faulted = self._faults.redis_was_faulted(stream.began_at)
        orchestrator_faulted = self._faults.orchestrator_was_faulted(
            attempt.orchestrator, attempt.began_at
        )
        code, where = attempt.code, f"orchestrator {attempt.orchestrator}"
        if attempt.result is not None or attempt.has_timed_out or code is None:
            how = "cut the output short" if attempt.result is not None else "sent nothing more"
            if not orchestrator_faulted:
                stream.problems.append(f"{where} {how} at token {len(stream.token_ids)}")
        elif not attempt.token_ids and _is_refusal(code, num_received, redis_faulted):
            stream.num_refused += 1
        elif code is _Code.ABORTED and stream.has_stray_call:
            stream.num_fenced += 1
        elif code is _Code.INVALID_ARGUMENT and redis_faulted and num_received:
            stream.is_not_resumable = True  # its last tokens were sent while Redis was unreachable
        elif code not in _BROKEN or not orchestrator_faulted:
            how = f"{code.name}: {attempt.detail}"
            stream.problems.append(f"{where} failed at token {len(stream.token_ids)}: {how}")


def served_then_refused(*attempts: Attempt) -> list[Attempt]:
    """Two concurrent calls of a session in order: the served one, then the refused one.

    If neither received anything, the ABORTED one was refused: the other had the session, on an
    orchestrator that froze before its first token.
    """
    return sorted(
        attempts,
        key=lambda a: (not (a.token_ids or a.is_finished), a.code is _Code.ABORTED),
    )


def _is_refusal(code: grpc.StatusCode, num_received: int, redis_faulted: bool) -> bool:
    """Whether a call that sent nothing was refused and may be repeated."""
    if code is _Code.NOT_FOUND:
        # The orchestrator died before it recorded anything; or the generation began while Redis was
        # away and is about to be written.
        return num_received == 0 or redis_faulted
    return code is _Code.RESOURCE_EXHAUSTED or (code is _Code.UNAVAILABLE and redis_faulted)
