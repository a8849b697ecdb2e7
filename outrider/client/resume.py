"""Follows one generation to its end over several orchestrators.

A broken stream is resumed at the next orchestrator, after the tokens already received. Owns the
received output and the choice of the next orchestrator. Reports its steps through `report`.
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

# Delay between two requests while no orchestrator resumes the stream.
_RETRY_INTERVAL_S = 0.2
# A broken stream keeps its session in use until its orchestrator notices the break.
_DELETE_TIMEOUT_S = 5.0
# Statuses after which a stream or a first request is sent to another orchestrator. ABORTED is not
# among them: it means that another client uses the session. CANCELLED is: this client did not read
# for a while, because it was suspended.
_BROKEN = ("UNAVAILABLE", "CANCELLED")
# While a broken stream is being resumed, these may be temporary as well.
_TEMPORARY = (*_BROKEN, "ABORTED", "RESOURCE_EXHAUSTED", "NOT_FOUND")
# After a Redis failover the session may be missing for a while; after this time it is lost.
UNKNOWN_SESSION_TIMEOUT_S = 10.0
# The session exists and cannot be resumed from these tokens.
_FINAL = ("INVALID_ARGUMENT", "FAILED_PRECONDITION")

Request = orchestrator_pb2.GenerateRequest


@dataclass(frozen=True)
class ResumeLimits:
    """Time limits of a followed generation.

    `resume_for_s`: how long to look for an orchestrator that resumes a broken stream. `timeout_s`:
    limit of the whole generation; None: no limit.
    """

    resume_for_s: float
    timeout_s: float | None = None


class ResumeFailed(CallFailed):
    """No orchestrator resumed the stream.

    `num_received` tokens were received; the session `session_id` has all that were recorded.
    `can_resume`: a later request may still resume it.
    """

    def __init__(self, why: str, session_id: str, num_received: int, *, can_resume: bool) -> None:
        super().__init__(f"{why}; {num_received} tokens were received")
        self.session_id = session_id
        self.num_received = num_received
        self.can_resume = can_resume


class StreamFollower:
    """Follows one generation. Its request must name a session: only a session can be resumed.

    `clients`: one per orchestrator, in the order to try them. `has_turns`: the session may already
    have turns. `show` is called with each message, `report` with each event in words.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        request: Request,
        limits: ResumeLimits,
        *,
        has_turns: bool,
        show: Show | None,
        report: Callable[[str], None],
    ) -> None:
        self._clients = clients
        self._request = request
        self._limits = limits
        self._has_turns = has_turns
        self._show = show
        self._report = report
        self._output = Output()
        # Index of the orchestrator in use, modulo their number.
        self._index = 0
        # Requests that may have reached an orchestrator; consecutive ones that reached none.
        self._num_delivered = self._num_undelivered = 0
        self._num_turns_before = 0
        self._may_have_started = False
        self._broke_at: float | None = None
        # Time since which the session, which had tokens, is missing everywhere.
        self._unknown_at: float | None = None
        self._deadline = None if limits.timeout_s is None else _now() + limits.timeout_s

    async def run(self) -> Output:
        """Runs the generation to its end. Raises ResumeFailed; CallFailed for a refused request."""
        if self._has_turns:
            self._num_turns_before = await self._count_turns()
        while True:
            try:
                await self._generate(self._client)
                return self._output
            except CallFailed as error:
                self._handle_failure(error)
            await asyncio.sleep(_RETRY_INTERVAL_S if self._num_delivered else 0)

    @property
    def _client(self) -> Client:
        return self._clients[self._index % len(self._clients)]

    @property
    def _num_received(self) -> int:
        return self._request.resume_from + len(self._output.token_ids)

    async def _generate(self, client: Client) -> None:
        request = await self._next_request(client)
        timeout_s = None if self._deadline is None else max(0.0, self._deadline - _now())
        self._may_have_started = True
        try:
            await client.generate(request, show=self._receive, timeout_s=timeout_s)
        except InternalError as error:
            raise CallFailed(f"UNAVAILABLE: {error}") from error
        if _is_cut_short(self._output.result):
            raise CallFailed("UNAVAILABLE: the server is stopping")

    def _receive(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        if self._broke_at is not None:
            self._report(f"resumed at {self._client.endpoint}")
            self._broke_at = self._unknown_at = None
        if _is_cut_short(chunk.result):
            chunk = _without_uncertain_text(chunk)
        self._output.add(chunk)
        if self._show is not None:
            self._show(chunk)

    async def _next_request(self, client: Client) -> Request:
        """The original request until the session has its turn, then one that resumes it."""
        is_new = not self._request.HasField("resume_from") and not self._output.token_ids
        if is_new and not (self._num_delivered and await self._has_started(client)):
            return self._request
        return Request(
            session_id=self._request.session_id,
            resume_from=self._num_received,
            priority=self._request.priority,
        )

    async def _has_started(self, client: Client) -> bool:
        return await _num_turns(client, self._request.session_id) > self._num_turns_before

    async def _count_turns(self) -> int:
        """The session's number of turns, from the first orchestrator that responds."""
        for client in self._clients[:-1]:
            with contextlib.suppress(CallFailed):
                return await _num_turns(client, self._request.session_id)
        return await _num_turns(self._clients[-1], self._request.session_id)

    def _handle_failure(self, error: CallFailed) -> None:
        """Selects the next orchestrator, or raises if another one cannot help."""
        if self._broke_at is not None and error.code in _FINAL:
            raise self._resume_failed(str(error), can_resume=False) from error
        if error.code not in (_BROKEN if self._broke_at is None else _TEMPORARY):
            raise error
        self._num_delivered += error.was_delivered
        self._num_undelivered = 0 if error.was_delivered else self._num_undelivered + 1
        if self._num_delivered:
            self._note_break(error)
        else:
            self._may_have_started = False
            if self._num_undelivered >= len(self._clients):
                raise error
            self._report(f"{error}; trying the next endpoint")
        self._index += 1

    def _note_break(self, error: CallFailed) -> None:
        now = _now()
        if self._broke_at is None:
            self._broke_at = now
            self._report(f"the stream broke after {self._num_received} tokens: {error}")
        waited_s, wait_s = now - self._broke_at, self._limits.resume_for_s
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
        while _now() < until:
            try:
                await self._client.delete_session(self._request.session_id)
                return
            except CallFailed as failure:
                if failure.code == "NOT_FOUND":
                    return
                error = failure
            self._index += error.code in _BROKEN
            await asyncio.sleep(_RETRY_INTERVAL_S)
        self._report(
            f"session {self._request.session_id} could not be deleted and stays until it expires: "
            f"{error}"
        )


async def _num_turns(client: Client, session_id: str) -> int:
    try:
        return (await client.get_session(session_id)).num_turns
    except CallFailed as error:
        if error.code != "NOT_FOUND":
            raise
        return 0


def _is_cut_short(result: orchestrator_pb2.GenerateResult) -> bool:
    return result.finish_reason == orchestrator_pb2.FINISH_REASON_CANCELLED


def _without_uncertain_text(
    chunk: orchestrator_pb2.GenerateResponse,
) -> orchestrator_pb2.GenerateResponse:
    """The message without an incomplete character or a possible start of a stop string."""
    certain = orchestrator_pb2.GenerateResponse()
    certain.CopyFrom(chunk)
    certain.text = chunk.text[: chunk.text_ends[-1]] if chunk.text_ends else ""
    return certain


def _now() -> float:
    return time.monotonic()
