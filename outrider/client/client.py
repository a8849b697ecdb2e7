"""Asynchronous client of one or several orchestrators. `outrider.client.sync` blocks instead."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import weakref
from collections.abc import AsyncGenerator, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from outrider.client.channel import Access
from outrider.client.connection import Connection
from outrider.client.info import Audit, Models, Session, SessionList, SessionSummary
from outrider.client.messages import read_message
from outrider.client.request import ChatFields, Message, RequestFields, build_request
from outrider.client.results import Chunk, Generation, Output
from outrider.client.resume import BROKEN, Report, StreamFollower
from outrider.errors import CallFailed, ConfigError, ResumeFailed
from outrider.v1 import orchestrator_pb2

DEFAULT_ENDPOINT = "127.0.0.1:50051"
# How long to look for an orchestrator that resumes a broken stream.
RESUME_FOR_S = 30.0

_log = logging.getLogger("outrider.client")
Kind = TypeVar("Kind")
Messages = AsyncGenerator[orchestrator_pb2.GenerateResponse, None]


class GenerationStream:
    """A generation: an async iterator of Chunk. It begins with the first iteration.

    Leaving the loop, `aclose()`, the end of an `async with`, or dropping the stream ends the
    generation on the server. After an error, `output` has what was received.
    """

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self.output = Output()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """The next tokens. Raises CallFailed; ResumeFailed if a broken stream was not resumed."""
        while True:
            chunk = self.output.add(await anext(self._messages))
            if chunk.token_ids or chunk.text:
                return chunk

    async def result(self) -> Generation:
        """The finished generation; waits for its end. Raises as iteration does."""
        async for _ in self:
            pass
        finished = self.output.finished()
        if finished is None:
            raise CallFailed("CANCELLED: the generation was left before its end")
        return finished

    async def aclose(self) -> None:
        """Ends the generation on the server."""
        await self._messages.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


class AsyncClient:
    """Client of one or several orchestrators that share their sessions. For one event loop.

    New generations take the endpoints in turn; one that failed in the last seconds comes last. A
    broken stream is resumed, so that no token is lost or repeated. This needs a session: a
    generation without `session_id` gets a temporary one, which is deleted at its end.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] = DEFAULT_ENDPOINT,
        *,
        access: Access | None = None,
        resume_for_s: float = RESUME_FOR_S,
        report: Report = _log.warning,
    ) -> None:
        """Connects with the first request. Raises ConfigError for endpoints and files.

        `endpoint`: host:port, or several of them. `access`: TLS files and API key.
        `resume_for_s`: how long to look for an orchestrator that resumes a broken stream; 0: it
        fails at once, and generations get no temporary session. `report`: is called with each
        failure that was survived, in words; by default it is logged.
        """
        endpoints = [endpoint] if isinstance(endpoint, str) else list(endpoint)
        if not endpoints:
            raise ConfigError("endpoint: the list is empty")
        self._connections = [Connection(each, access) for each in endpoints]
        self._resume_for_s = resume_for_s
        self._report = report
        self._num_begun = 0
        self._running: weakref.WeakSet[Messages] = weakref.WeakSet()
        # Deletions of temporary sessions.
        self._deletions: set[asyncio.Task[None]] = set()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> GenerationStream:
        """Continues a text, or token ids. `timeout_s`: limit of the whole generation.

        With `session_id` it is a turn of that session. Raises InvalidRequest for an unknown field.
        """
        return self.stream(build_request(prompt, fields=fields), timeout_s=timeout_s)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout_s: float | None = None,
        **fields: Unpack[ChatFields],
    ) -> GenerationStream:
        """The assistant's answer to messages such as {"role": "user", "content": "Hi"}.

        They are rendered with the model's chat template. With `session_id`, `messages` are the new
        ones. Tools and messages may have OpenAI's form. Otherwise as `generate`.
        """
        return self.stream(build_request(messages=messages, fields=fields), timeout_s=timeout_s)

    def resume(
        self, session_id: str, num_received: int, *, timeout_s: float | None = None
    ) -> GenerationStream:
        """The rest of the session's last turn, after the `num_received` tokens of it."""
        fields = RequestFields(session_id=session_id)
        request = build_request(resume_from=num_received, fields=fields)
        return self.stream(request, timeout_s=timeout_s)

    def stream(
        self, request: orchestrator_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> GenerationStream:
        """The generation of a request message of the contract."""
        messages = self._messages(request, timeout_s)
        self._running.add(messages)
        return GenerationStream(messages)

    async def get_session(self, session_id: str) -> Session:
        """Tokens and statistics of a session. Raises CallFailed."""
        request = orchestrator_pb2.GetSessionRequest(session_id=session_id)
        return await self._read(Session, "GetSession", request)

    async def list_sessions(self) -> SessionList:
        """All sessions of the API key, sorted by name. Raises CallFailed."""
        # By name: a scan of Redis may return a session twice.
        found: dict[str, SessionSummary] = {}
        num_unreadable = 0
        request = orchestrator_pb2.ListSessionsRequest()
        while True:
            page = await self._send("ListSessions", request)
            for session in page.sessions:
                found[session.session_id] = read_message(SessionSummary, session)
            num_unreadable += page.num_unreadable
            if not page.next_page_token:
                return SessionList([found[name] for name in sorted(found)], num_unreadable)
            request.page_token = page.next_page_token

    async def delete_session(self, session_id: str) -> None:
        """Deletes a session and its KV cache. Raises CallFailed."""
        request = orchestrator_pb2.DeleteSessionRequest(session_id=session_id)
        await self._send("DeleteSession", request)

    async def models(self) -> Models:
        """The models that the orchestrator serves. Raises CallFailed."""
        return await self._read(Models, "GetModelInfo", orchestrator_pb2.GetModelInfoRequest())

    async def audit(self) -> Audit:
        """Results of the orchestrator's losslessness audit. Raises CallFailed."""
        return await self._read(Audit, "GetAudit", orchestrator_pb2.GetAuditRequest())

    async def aclose(self) -> None:
        """Ends all generations, waits for the deletion of temporary sessions, then disconnects."""
        for messages in list(self._running):
            with contextlib.suppress(RuntimeError):  # another task waits for its next message
                await messages.aclose()
        while self._deletions:
            await asyncio.wait(self._deletions)
        for connection in self._connections:
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _messages(
        self, request: orchestrator_pb2.GenerateRequest, timeout_s: float | None
    ) -> Messages:
        is_temporary = bool(self._resume_for_s) and not request.session_id
        if is_temporary:
            given, request = request, orchestrator_pb2.GenerateRequest()
            request.CopyFrom(given)
            request.session_id, request.create_session = f"client-{secrets.token_hex(8)}", True
        follower = StreamFollower(
            self._in_turn(),
            request,
            self._report,
            resume_for_s=self._resume_for_s,
            has_turns=not is_temporary and not request.HasField("resume_from"),
            timeout_s=timeout_s,
        )
        try:
            async with contextlib.aclosing(follower.messages()) as messages:
                async for message in messages:
                    yield message
        except ResumeFailed:
            is_temporary = False  # kept, to resume the generation by hand
            raise
        finally:
            if is_temporary:
                self._delete(follower.delete_session())

    def _delete(self, deletion: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(deletion)
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    def _in_turn(self) -> list[Connection]:
        """The connections in the order to try them: from the next in turn, failed ones last."""
        start = self._num_begun % len(self._connections)
        self._num_begun += 1
        order = self._connections[start:] + self._connections[:start]
        return sorted(order, key=lambda connection: connection.has_failed_lately)

    async def _read(self, kind: type[Kind], method: str, request: Any) -> Kind:
        return read_message(kind, await self._send(method, request))

    async def _send(self, method: str, request: Any) -> Any:
        """Response to a short request, which the next endpoint gets if one is unavailable."""
        *others, last = self._in_turn()
        for connection in others:
            try:
                return await connection.send(method, request)
            except CallFailed as error:
                if connection.is_closed or error.code not in BROKEN:
                    raise
                connection.note_failure()
                self._report(f"{error}; trying the next endpoint")
        return await last.send(method, request)
