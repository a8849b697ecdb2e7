"""Follows one generation to its end over one or several orchestrators.

A broken stream is resumed after the tokens already received, at the next orchestrator or at the
same one. Owns the choice of the next orchestrator. Reports its steps through `report`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from outrider.client.connection import Connection
from outrider.errors import CallFailed, InternalError, ResumeFailed
from outrider.v1 import orchestrator_pb2

# Delay between two requests while no orchestrator resumes the stream.
_RETRY_INTERVAL_S = 0.2
# A broken stream keeps its session in use until its orchestrator notices the break.
_DELETE_TIMEOUT_S = 5.0
# Statuses after which a stream or a first request is sent to another orchestrator. ABORTED is not
# among them: it means that another client uses the session. CANCELLED is: this client did not read
# for a while, because it was suspended.
BROKEN = ("UNAVAILABLE", "CANCELLED")
# While a broken stream is being resumed, these may be temporary as well.
_TEMPORARY = (*BROKEN, "ABORTED", "RESOURCE_EXHAUSTED", "NOT_FOUND")
# After a Redis failover the session may be missing for a while; after this time it is lost.
UNKNOWN_SESSION_TIMEOUT_S = 10.0
# The session exists and cannot be resumed from these tokens.
_FINAL = ("INVALID_ARGUMENT", "FAILED_PRECONDITION")

Request = orchestrator_pb2.GenerateRequest
Response = orchestrator_pb2.GenerateResponse
Report = Callable[[str], None]


class StreamFollower:
    """Follows one generation. Its request must name a session: only a session can be resumed.

    `connections`: one per orchestrator, in the order to try them. `resume_for_s`: how long to look
    for one that resumes a broken stream; 0: none is resumed, and a session is not needed.
    `has_turns`: the session may already have turns. `timeout_s`: limit of the whole generation.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        request: Request,
        report: Report,
        *,
        resume_for_s: float,
        has_turns: bool,
        timeout_s: float | None = None,
    ) -> None:
        self._connections = connections
        self._request = request
        self._report = report
        self._resume_for_s = resume_for_s
        self._has_turns = has_turns
        # Index of the orchestrator in use, modulo their number.
        self._index = 0
        # Requests that may have reached an orchestrator; consecutive ones that reached none.
        self._num_delivered = self._num_undelivered = 0
        self._num_turns_before = 0
        self._num_new = 0
        self._may_have_started = False
        self._broke_at: float | None = None
        # Time since which the session, which had tokens, is missing everywhere.
        self._unknown_at: float | None = None
        self._deadline = None if timeout_s is None else _now() + timeout_s

    async def messages(self) -> AsyncGenerator[Response, None]:
        """The generation's messages to its end; no token is missing or sent twice.

        Raises ResumeFailed; CallFailed for a refused request.
        """
        if self._has_turns and self._resume_for_s:
            self._num_turns_before = await self._count_turns()
        while True:
            try:
                async with contextlib.aclosing(self._attempt()) as messages:
                    async for message in messages:
                        yield message
                return
            except CallFailed as error:
                self._handle_failure(error)
            await asyncio.sleep(_RETRY_INTERVAL_S if self._num_delivered else 0)

    @property
    def _connection(self) -> Connection:
        return self._connections[self._index % len(self._connections)]

    @property
    def _num_received(self) -> int:
        return self._request.resume_from + self._num_new

    async def _attempt(self) -> AsyncGenerator[Response, None]:
        request = await self._next_request()
        timeout_s = None if self._deadline is None else max(0.0, self._deadline - _now())
        self._may_have_started = True
        message = Response()
        async with contextlib.aclosing(self._connection.generate(request, timeout_s)) as messages:
            async for message in messages:
                yield self._received(message)
        if not message.result.finish_reason:
            why = "the orchestrator ended the stream without a result"
            raise CallFailed(f"UNAVAILABLE: {why}") if self._resume_for_s else InternalError(why)
        if self._resume_for_s and _is_cut_short(message):
            raise CallFailed("UNAVAILABLE: the server is stopping")

    def _received(self, message: Response) -> Response:
        if self._broke_at is not None:
            self._report(f"resumed at {self._connection.endpoint}")
            self._broke_at = self._unknown_at = None
        self._num_new += len(message.token_ids)
        is_to_be_resumed = self._resume_for_s and _is_cut_short(message)
        return _without_uncertain_text(message) if is_to_be_resumed else message

    async def _next_request(self) -> Request:
        """The original request until the session has its turn, then one that resumes it."""
        is_new = not self._request.HasField("resume_from") and not self._num_new
        if is_new and not (self._num_delivered and await self._has_started()):
            return self._request
        return Request(
            session_id=self._request.session_id,
            resume_from=self._num_received,
            priority=self._request.priority,
        )

    async def _has_started(self) -> bool:
        num_turns = await _num_turns(self._connection, self._request.session_id)
        return num_turns > self._num_turns_before

    async def _count_turns(self) -> int:
        """The session's number of turns, from the first orchestrator that responds."""
        for connection in self._connections[:-1]:
            with contextlib.suppress(CallFailed):
                return await _num_turns(connection, self._request.session_id)
        return await _num_turns(self._connections[-1], self._request.session_id)

    def _handle_failure(self, error: CallFailed) -> None:
        """Selects the next orchestrator, or raises if another one cannot help."""
        if self._broke_at is not None and error.code in _FINAL:
            raise self._resume_failed(str(error), can_resume=False) from error
        is_over = self._connection.is_closed or (error.was_delivered and not self._resume_for_s)
        if is_over or error.code not in (BROKEN if self._broke_at is None else _TEMPORARY):
            raise error
        self._connection.note_failure()
        self._num_delivered += error.was_delivered
        self._num_undelivered = 0 if error.was_delivered else self._num_undelivered + 1
        if self._num_delivered:
            self._note_break(error)
        else:
            self._may_have_started = False
            if self._num_undelivered >= len(self._connections):
                raise error
            self._report(f"{error}; trying the next endpoint")
        self._index += 1

    def _note_break(self, error: CallFailed) -> None:
        now = _now()
        if self._broke_at is None:
            self._broke_at = now
            self._report(f"the stream broke after {self._num_received} tokens: {error}")
        waited_s, wait_s = now - self._broke_at, self._resume_for_s
        if error.code == "NOT_FOUND":
            if self._unknown_at is None:
                self._unknown_at = now
                self._report(f"{error}; retrying")
            waited_s, wait_s = now - self._unknown_at, min(wait_s, UNKNOWN_SESSION_TIMEOUT_S)
        if waited_s >= wait_s:
            why = f"{error}; no orchestrator resumed the stream within {waited_s:.0f} s"
            raise self._resume_failed(why, can_resume=True) from error

    def _resume_failed(self, why: str, *, can_resume: bool) -> ResumeFailed:
        return ResumeFailed(
            why, self._request.session_id, self._num_received, can_resume=can_resume
        )

    async def delete_session(self) -> None:
        """Deletes the session, if there may be one; reports a failure to do so."""
        if not self._may_have_started:
            return
        error: CallFailed | None = None
        until = _now() + _DELETE_TIMEOUT_S
        request = orchestrator_pb2.DeleteSessionRequest(session_id=self._request.session_id)
        while _now() < until and not self._connection.is_closed:
            try:
                await self._connection.send("DeleteSession", request)
                return
            except CallFailed as failure:
                if failure.code == "NOT_FOUND":
                    return
                error = failure
            self._index += error.code in BROKEN
            await asyncio.sleep(_RETRY_INTERVAL_S)
        self._report(
            f"session {self._request.session_id} could not be deleted and stays until it expires: "
            f"{error or 'the client was closed'}"
        )


async def _num_turns(connection: Connection, session_id: str) -> int:
    request = orchestrator_pb2.GetSessionRequest(session_id=session_id)
    try:
        return int((await connection.send("GetSession", request)).num_turns)
    except CallFailed as error:
        if error.code != "NOT_FOUND":
            raise
        return 0


def _is_cut_short(message: Response) -> bool:
    return message.result.finish_reason == orchestrator_pb2.FINISH_REASON_CANCELLED


def _without_uncertain_text(message: Response) -> Response:
    """The message without an incomplete character or a possible start of a stop string.

    It is not the last one: without a result, too.
    """
    certain = Response()
    certain.CopyFrom(message)
    certain.text = message.text[: message.text_ends[-1]] if message.text_ends else ""
    certain.ClearField("result")
    return certain


def _now() -> float:
    return time.monotonic()
