"""Fake orchestrators with shared sessions that make one mistake, chosen by the test.

The real contract over real gRPC. The output is a hash of the context; there are no model tiers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from outrider.runtime.grpc_server import SERVER_OPTIONS
from outrider.v1 import model_pb2, orchestrator_pb2, orchestrator_pb2_grpc
from outrider_bench.chaos.calls import Attempt, OrchestratorStubs

VOCAB_SIZE = 300
_CHUNK = 3
_CHUNK_S = 0.002


def next_token(token_ids: list[int]) -> int:
    """Next token after those."""
    return (token_ids[-1] * 31 + len(token_ids) * 7) % VOCAB_SIZE


@dataclass
class Session:
    token_ids: list[int]
    prompt_len: int
    max_tokens: int
    # Number of the call that may write: the last that took the session; 0: none.
    writer: int = 0


@dataclass
class SharedState:
    """Sessions of all orchestrators, and the mistake. `mistakes_left`: how often it will occur."""

    mistake: str = ""
    mistakes_left: int = 1
    sessions: dict[str, Session] = field(default_factory=dict)
    num_calls: int = 0
    # By session: the calls that request it as new, as their clients see them.
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)

    def has_slow_rival(self, session_id: str, num_chunks: int) -> bool:
        """Whether another call for the session has received fewer chunks and may still receive
        more.
        """
        return any(
            len(attempt.times) < num_chunks
            for attempt in self.attempts.get(session_id, ())
            if attempt.result is None and attempt.code is None
            if not attempt.has_disconnected and not attempt.has_timed_out
        )

    def takes_mistake(self, how: str) -> bool:
        """Whether to make this mistake now; counts it."""
        if self.mistake != how or self.mistakes_left == 0:
            return False
        self.mistakes_left -= 1
        return True


class RecordingStubs(OrchestratorStubs):
    """Client stubs that record in the shared state which calls were made."""

    def __init__(self, shared: SharedState, channels: Sequence[grpc.aio.Channel]) -> None:
        super().__init__(channels)
        self._shared = shared

    async def call(
        self,
        attempt: Attempt,
        request: orchestrator_pb2.GenerateRequest,
        disconnects_at: int | None = None,
    ) -> None:
        if not request.HasField("resume_from"):
            self._shared.attempts.setdefault(request.session_id, []).append(attempt)
        await super().call(attempt, request, disconnects_at)


class FakeOrchestrator(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    def __init__(self, shared: SharedState) -> None:
        self._shared = shared

    async def GetModelInfo(
        self, request: Any, context: Any
    ) -> orchestrator_pb2.GetModelInfoResponse:
        model = model_pb2.ModelInfo(vocab_size=VOCAB_SIZE)
        return orchestrator_pb2.GetModelInfoResponse(target=model, max_gamma=4)

    async def GetSession(
        self, request: orchestrator_pb2.GetSessionRequest, context: Any
    ) -> orchestrator_pb2.GetSessionResponse:
        session = self._shared.sessions.get(request.session_id)
        if session is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such session")
        assert session is not None
        token_ids = session.token_ids
        if len(token_ids) > session.prompt_len + 4 and self._shared.takes_mistake("loses in Redis"):
            token_ids = token_ids[:-1]
        in_use = session.writer != 0
        return orchestrator_pb2.GetSessionResponse(token_ids=token_ids, in_use=in_use)

    async def DeleteSession(self, request: Any, context: Any) -> Any:
        self._shared.sessions.pop(request.session_id, None)
        return orchestrator_pb2.DeleteSessionResponse()

    async def Generate(self, request: orchestrator_pb2.GenerateRequest, context: Any) -> None:
        shared = self._shared
        shared.num_calls += 1
        call_number, name = shared.num_calls, request.session_id or f"one-off {shared.num_calls}"
        if request.HasField("resume_from"):
            session, num_received = shared.sessions[name], request.resume_from
            if shared.takes_mistake("resumes a token late"):
                num_received += 1
        else:
            if name in shared.sessions and not shared.takes_mistake("serves two at once"):
                await context.abort(grpc.StatusCode.ABORTED, "in use")
            prompt = list(request.token_ids.ids)
            session, num_received = Session(prompt, len(prompt), request.sampling.max_tokens), 0
            shared.sessions[name] = session
        session.writer = call_number
        try:
            await self._stream(session, call_number, num_received, request.session_id, context)
        finally:
            if session.writer == call_number:
                session.writer = 0

    async def _stream(
        self, session: Session, call_number: int, num_sent: int, session_id: str, context: Any
    ) -> None:
        end, has_session = session.prompt_len + session.max_tokens, bool(session_id)
        for num_chunks in itertools.count():
            await asyncio.sleep(_CHUNK_S)
            # Otherwise one call could finish before the other, slower one arrives.
            while self._shared.has_slow_rival(session_id, num_chunks):  # noqa: ASYNC110
                await asyncio.sleep(_CHUNK_S)
            if session.writer != call_number:
                await context.abort(grpc.StatusCode.ABORTED, "taken by a later call")
            for _ in range(min(_CHUNK, end - len(session.token_ids))):
                session.token_ids.append(next_token(session.token_ids))
            sent = session.token_ids[session.prompt_len + num_sent :]
            num_sent += len(sent)
            is_early = num_sent < session.max_tokens
            if has_session and sent and is_early:
                sent = await self._with_mistake(sent, context)
            await context.write(orchestrator_pb2.GenerateResponse(token_ids=sent))
            if not is_early:
                break
        await context.write(orchestrator_pb2.GenerateResponse(result=self._result(has_session)))

    async def _with_mistake(self, sent: list[int], context: Any) -> list[int]:
        shared = self._shared
        if shared.takes_mistake("loses a token"):
            return sent[:-1]
        if shared.takes_mistake("repeats a token"):
            return [*sent, sent[-1]]
        if shared.takes_mistake("changes a token"):
            return [*sent[:-1], (sent[-1] + 1) % VOCAB_SIZE]
        if shared.takes_mistake("fails"):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the target is gone")
        return sent

    def _result(self, has_session: bool) -> orchestrator_pb2.GenerateResult:
        reason = orchestrator_pb2.FINISH_REASON_LENGTH
        if has_session and self._shared.takes_mistake("gives a wrong reason"):
            reason = orchestrator_pb2.FINISH_REASON_STOP
        return orchestrator_pb2.GenerateResult(finish_reason=reason, recorded=True)


@contextlib.asynccontextmanager
async def fake_orchestrators(shared: SharedState, num: int = 2) -> AsyncIterator[list[str]]:
    """Yields host:port of each fake orchestrator."""
    async with contextlib.AsyncExitStack() as stack:
        endpoints = []
        for _ in range(num):
            server = grpc.aio.server(options=SERVER_OPTIONS)  # allows the clients' pings
            servicer = FakeOrchestrator(shared)
            orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, 0)
            endpoints.append(f"127.0.0.1:{port}")
        yield endpoints
