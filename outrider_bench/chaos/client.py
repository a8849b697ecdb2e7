"""One generation followed to its end by its caller, on whichever orchestrator serves.

Owns what the caller holds, when it came, and whether a call may have failed as it did. Knows no
fault: whether one may be the reason is asked of `Excuse`. What the tokens must be is for `audit`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from outrider.v1 import orchestrator_pb2
from outrider_bench.chaos.calls import GIVE_UP_S, Attempt, Orchestrators
from outrider_bench.chaos.jobs import Caller, Job

_RETRY_S = 0.1

_Code = grpc.StatusCode


class Excuse(Protocol):
    """Whether a fault of that sort was about, at or after `since` (time.monotonic())."""

    def orchestrator(self, number: int, since: float) -> bool: ...
    def redis(self, since: float) -> bool: ...


@dataclass(eq=False)
class Stream:
    """What one caller has lived through. `problems`: what must not happen, in its own words."""

    job: Job
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    orchestrator: int = 0
    began_at: float = 0.0
    ended_at: float | None = None
    result: orchestrator_pb2.GenerateResult | None = None
    problems: list[str] = field(default_factory=list)
    num_resumed: int = 0
    # Calls that an orchestrator refused before they began, and that were made again.
    num_refused: int = 0
    # Calls told that another one has the session: of two callers, or overtaken by an earlier
    # resumption that was thought lost and arrived after all.
    num_fenced: int = 0
    has_stray_call: bool = False
    # From a resuming call to its first token.
    resume_waits_s: list[float] = field(default_factory=list)
    # Its tokens could not be continued, as documented: Redis was away when its caller left.
    is_lost_to_redis: bool = False
    # A second caller may have added a turn of its own to the session.
    is_session_shared: bool = False

    @property
    def has_left(self) -> bool:
        """Its caller went away for good."""
        return self.job.caller is Caller.ABANDONS and self.result is None

    @property
    def is_wanted(self) -> bool:
        """More may come of it, and its caller is there to take it."""
        is_over = self.result is not None or self.is_lost_to_redis or bool(self.problems)
        return not is_over and not self.has_left

    def take(self, attempt: Attempt, num_held: int) -> None:
        """What that call has sent behind the first `num_held` tokens; what is there must agree."""
        known = self.token_ids[num_held:]
        shared = min(len(known), len(attempt.token_ids))
        if known[:shared] != attempt.token_ids[:shared]:
            self.problems.append(f"two calls were sent different tokens behind token {num_held}")
        self.token_ids += attempt.token_ids[shared:]
        self.times = sorted(self.times + attempt.times)
        if attempt.is_finished:
            self.result = attempt.result

    def note_resumption(self, attempt: Attempt) -> None:
        """Of a call that resumed it, if it brought anything."""
        if attempt.times:
            self.num_resumed += 1
            self.resume_waits_s.append(attempt.times[0] - attempt.began_at)


class Follower:
    """Follows streams; one for all of a run."""

    def __init__(self, orchestrators: Orchestrators, excuse: Excuse) -> None:
        self._orchestrators = orchestrators
        self._excuse = excuse

    async def follow(self, stream: Stream) -> None:
        """To its end, or to where its caller leaves it. What went wrong is noted, never raised."""
        job = stream.job
        stream.orchestrator, stream.began_at = job.first, time.monotonic()
        try:
            if job.caller is Caller.ASKS_TWICE:
                await self._ask_twice(stream)
            else:
                attempt = await self._call(stream, job.request(), 0, job.leaves_at)
                if attempt.has_left and job.caller is Caller.RESUMES_TWICE:
                    await self._resume_twice(stream)
            while stream.is_wanted:
                if time.monotonic() > stream.began_at + GIVE_UP_S:
                    stream.problems.append(f"not finished within {GIVE_UP_S:g} s")
                    return
                await self._resume(stream)
        finally:
            stream.ended_at = time.monotonic()

    async def _resume(self, stream: Stream) -> None:
        """Once, on the next orchestrator; from the beginning where nothing is known of it."""
        stream.orchestrator = self._orchestrators.after(stream.orchestrator)
        num_held = len(stream.token_ids)
        attempt = await self._call(stream, stream.job.resumption(num_held), num_held)
        if attempt.code is _Code.NOT_FOUND and not num_held:
            attempt = await self._call(stream, stream.job.request(), 0)
        else:
            stream.note_resumption(attempt)
        if not attempt.token_ids:
            await asyncio.sleep(_RETRY_S)

    async def _call(
        self,
        stream: Stream,
        request: orchestrator_pb2.GenerateRequest,
        num_held: int,
        leaves_at: int | None = None,
    ) -> Attempt:
        """One call, its tokens taken and its end judged."""
        attempt = Attempt(stream.orchestrator, time.monotonic())
        await self._orchestrators.attempt(attempt, request, leaves_at)
        stream.take(attempt, num_held)
        self._judge(stream, attempt, num_held)
        if not attempt.is_finished and not attempt.is_answer and request.HasField("resume_from"):
            stream.has_stray_call = True
        return attempt

    async def _ask_twice(self, stream: Stream) -> None:
        """One of two orchestrators gets the session, the other must refuse."""
        request = stream.job.request()
        first, second = await self._race(stream, request)
        if first.overlaps(second):
            stream.problems.append("two callers were served at once in one session")
        winner, loser = served_first(first, second)
        stream.orchestrator = winner.orchestrator
        stream.take(winner, 0)
        self._judge(stream, winner, 0)
        self._judge_rival(stream, loser, 0)

    async def _resume_twice(self, stream: Stream) -> None:
        """Both may be sent tokens, the same ones; whoever is overtaken is told so."""
        num_held = len(stream.token_ids)
        attempts = await self._race(stream, stream.job.resumption(num_held))
        for attempt in sorted(attempts, key=lambda a: len(a.token_ids), reverse=True):
            stream.take(attempt, num_held)
            stream.note_resumption(attempt)
            self._judge_rival(stream, attempt, num_held)

    async def _race(
        self, stream: Stream, request: orchestrator_pb2.GenerateRequest
    ) -> tuple[Attempt, Attempt]:
        """The same call on two orchestrators; when one has finished the other is left."""
        numbers = (stream.orchestrator, self._orchestrators.after(stream.orchestrator))
        attempts = [Attempt(number, time.monotonic()) for number in numbers]
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(self._orchestrators.attempt(a, request)) for a in attempts]
            waiting = set(calls)
            while waiting and not any(attempt.is_finished for attempt in attempts):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for call, attempt in zip(calls, attempts, strict=True):
                attempt.has_left = call in waiting
                call.cancel()
        return attempts[0], attempts[1]

    def _judge_rival(self, stream: Stream, attempt: Attempt, num_held: int) -> None:
        if attempt.code is _Code.ABORTED:
            stream.num_fenced += 1
        elif attempt.has_left or attempt.is_finished:
            stream.is_session_shared = stream.job.caller is Caller.ASKS_TWICE
        else:
            self._judge(stream, attempt, num_held)

    def _judge(self, stream: Stream, attempt: Attempt, num_held: int) -> None:
        """Whether a call may end so: streams break with their orchestrator, and by nothing else."""
        if attempt.is_finished or attempt.has_left:
            return
        by_redis = self._excuse.redis(stream.began_at)
        by_orchestrator = self._excuse.orchestrator(attempt.orchestrator, attempt.began_at)
        code, where = attempt.code, f"orchestrator {attempt.orchestrator}"
        if attempt.result is not None or attempt.is_silent or code is None:
            said = "was cut short" if attempt.result is not None else "said nothing more"
            if not by_orchestrator:
                stream.problems.append(f"{where} {said} at token {len(stream.token_ids)}")
        elif not attempt.token_ids and _is_refusal(code, num_held, by_redis):
            stream.num_refused += 1
        elif code is _Code.ABORTED and stream.has_stray_call:
            stream.num_fenced += 1
        elif code is _Code.INVALID_ARGUMENT and by_redis and num_held:
            stream.is_lost_to_redis = True  # its last tokens were shown while Redis was away
        elif not (code in (_Code.UNAVAILABLE, _Code.ABORTED) and by_orchestrator):
            how = f"{code.name}: {attempt.why}"
            stream.problems.append(f"{where} failed at token {len(stream.token_ids)}: {how}")


def served_first(*attempts: Attempt) -> list[Attempt]:
    """Rival attempts at one session: the one that was served, then the refused one.

    Where neither was sent anything, the refused one is ABORTED: the other had the session, on an
    orchestrator that froze before its first token.
    """
    return sorted(
        attempts,
        key=lambda a: (not (a.token_ids or a.is_finished), a.code is _Code.ABORTED),
    )


def _is_refusal(code: grpc.StatusCode, num_held: int, by_redis: bool) -> bool:
    """Of a call that has sent nothing; it may be made again."""
    if code is _Code.NOT_FOUND:
        # Nothing was recorded before its orchestrator died; or it was begun while Redis was away,
        # and is about to be written.
        return num_held == 0 or by_redis
    return code is _Code.RESOURCE_EXHAUSTED or (code is _Code.UNAVAILABLE and by_redis)
