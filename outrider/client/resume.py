"""One output followed to its end, whichever orchestrators it takes.

A stream that breaks goes on at the next one, from the tokens that are here. Owns what has come, and
where to ask next. Says what it does through `say`; knows no terminal and no flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outrider.client.client import Client, Output, Show
from outrider.errors import CallFailed, InternalError
from outrider.v1 import orchestrator_pb2

# Between calls, while nobody goes on with it.
_PAUSE_S = 0.2
# A stream that was cut off holds its session until its orchestrator has noticed.
_DELETE_FOR_S = 5.0
# What another orchestrator, or a later call, may answer otherwise. What a stream that runs is told,
# or the first call, is its caller's affair: somebody else may have taken the session over.
_BREAKS = ("UNAVAILABLE",)
_PASSES = (*_BREAKS, "ABORTED", "RESOURCE_EXHAUSTED", "NOT_FOUND")
# A Redis that has just taken over may not have the session yet. Later than this it will not come.
UNKNOWN_FOR_S = 10.0
# The session is there, and cannot be gone on with from these tokens.
_FINAL = ("INVALID_ARGUMENT", "FAILED_PRECONDITION")

Request = orchestrator_pb2.GenerateRequest


@dataclass(frozen=True)
class ResumeLimits:
    """`resume_for_s`: how long to look for an orchestrator that goes on with a broken stream.

    `timeout_s`: of everything; None: no limit.
    """

    resume_for_s: float
    timeout_s: float | None = None


class ResumeFailed(CallFailed):
    """Nobody went on with it. `num_held` of its tokens have come, `session_id` has them all.

    `can_resume`: another call may still go on with it.
    """

    def __init__(self, why: str, session_id: str, num_held: int, *, can_resume: bool) -> None:
        super().__init__(f"{why}; {num_held} tokens have come")
        self.session_id = session_id
        self.num_held = num_held
        self.can_resume = can_resume


class StreamFollower:
    """Follows one request; its session is what can be gone on with, so it must name one.

    `clients`: one for each orchestrator, in the order to ask them. `has_turns`: the session may
    have had some before.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        request: Request,
        patience: ResumeLimits,
        *,
        has_turns: bool,
        show: Show | None,
        say: Callable[[str], None],
    ) -> None:
        self._clients = clients
        self._request = request
        self._patience = patience
        self._has_turns = has_turns
        self._show = show
        self._say = say
        self._output = Output()
        self._at = 0
        # Calls that may have come to an orchestrator, and those in a row that did not.
        self._num_calls = self._num_unheard = 0
        self._num_turns_before = 0
        self._may_be_begun = False
        self._broke_at: float | None = None
        # Since when nobody knows the session, that had tokens.
        self._unknown_at: float | None = None
        self._deadline = None if patience.timeout_s is None else _now() + patience.timeout_s

    async def run(self) -> Output:
        """Raises CallFailed: the request was refused; GaveUp: nobody has gone on with it."""
        if self._has_turns:
            self._num_turns_before = await self._ask_num_turns()
        while True:
            try:
                await self._call(self._client)
                return self._output
            except CallFailed as error:
                self._failed(error)
            await asyncio.sleep(_PAUSE_S if self._num_calls else 0)

    @property
    def _client(self) -> Client:
        return self._clients[self._at % len(self._clients)]

    @property
    def _num_held(self) -> int:
        return self._request.resume_from + len(self._output.token_ids)

    async def _call(self, client: Client) -> None:
        request = await self._next_request(client)
        timeout_s = None if self._deadline is None else max(0.0, self._deadline - _now())
        self._may_be_begun = True
        try:
            await client.generate(request, show=self._take, timeout_s=timeout_s)
        except InternalError as error:
            raise CallFailed(f"UNAVAILABLE: {error}") from error
        if _is_cut_short(self._output.result):
            raise CallFailed("UNAVAILABLE: the server is stopping")

    def _take(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        if self._broke_at is not None:
            self._say(f"going on at {self._client.endpoint}")
            self._broke_at = self._unknown_at = None
        if _is_cut_short(chunk.result):
            chunk = _certain(chunk)
        self._output.add(chunk)
        if self._show is not None:
            self._show(chunk)

    async def _next_request(self, client: Client) -> Request:
        """As it was asked, or what is left of it: never twice in one session."""
        is_fresh = not self._request.HasField("resume_from") and not self._output.token_ids
        if is_fresh and not (self._num_calls and await self._is_begun(client)):
            return self._request
        return Request(
            session_id=self._request.session_id,
            resume_from=self._num_held,
            priority=self._request.priority,
        )

    async def _is_begun(self, client: Client) -> bool:
        return await _num_turns(client, self._request.session_id) > self._num_turns_before

    async def _ask_num_turns(self) -> int:
        """Of the first orchestrator that answers."""
        for client in self._clients[:-1]:
            with contextlib.suppress(CallFailed):
                return await _num_turns(client, self._request.session_id)
        return await _num_turns(self._clients[-1], self._request.session_id)

    def _failed(self, error: CallFailed) -> None:
        """Turns to the next orchestrator, or raises where that would not help."""
        if self._broke_at is not None and error.code in _FINAL:
            raise self._gave_up(str(error), can_resume=False) from error
        if error.code not in (_BREAKS if self._broke_at is None else _PASSES):
            raise error
        self._num_calls += error.was_heard
        self._num_unheard = 0 if error.was_heard else self._num_unheard + 1
        if self._num_calls:
            self._note_break(error)
        else:
            self._may_be_begun = False
            if self._num_unheard >= len(self._clients):
                raise error
            self._say(f"{error}; asking the next")
        self._at += 1

    def _note_break(self, error: CallFailed) -> None:
        now = _now()
        if self._broke_at is None:
            self._broke_at = now
            self._say(f"the stream broke after {self._num_held} tokens: {error}")
        waited_s, wait_s = now - self._broke_at, self._patience.resume_for_s
        if error.code == "NOT_FOUND":
            if self._unknown_at is None:
                self._unknown_at = now
                self._say(f"{error}; asking again")
            waited_s, wait_s = now - self._unknown_at, min(wait_s, UNKNOWN_FOR_S)
        if waited_s >= wait_s:
            why = f"{error}; nobody went on with it for {waited_s:.0f} s"
            raise self._gave_up(why, can_resume=True) from error

    def _gave_up(self, why: str, *, can_resume: bool) -> ResumeFailed:
        return ResumeFailed(why, self._request.session_id, self._num_held, can_resume=can_resume)

    async def forget(self) -> None:
        """Deletes the session, if there may be one; says so where nobody does."""
        if not self._may_be_begun:
            return
        error: CallFailed | None = None
        until = _now() + _DELETE_FOR_S
        while _now() < until:
            try:
                await self._client.delete_session(self._request.session_id)
                return
            except CallFailed as failure:
                if failure.code == "NOT_FOUND":
                    return
                error = failure
            self._at += error.code in _BREAKS
            await asyncio.sleep(_PAUSE_S)
        self._say(f"session {self._request.session_id} is left until it expires: {error}")


async def _num_turns(client: Client, session_id: str) -> int:
    try:
        return (await client.get_session(session_id)).num_turns
    except CallFailed as error:
        if error.code != "NOT_FOUND":
            raise
        return 0


def _is_cut_short(result: orchestrator_pb2.GenerateResult) -> bool:
    return result.finish_reason == orchestrator_pb2.FINISH_REASON_CANCELLED


def _certain(chunk: orchestrator_pb2.GenerateResponse) -> orchestrator_pb2.GenerateResponse:
    """Without text that is not certain: half a character, or what may begin a stop string."""
    kept = orchestrator_pb2.GenerateResponse()
    kept.CopyFrom(chunk)
    kept.text = chunk.text[: chunk.text_ends[-1]] if chunk.text_ends else ""
    return kept


def _now() -> float:
    return time.monotonic()
