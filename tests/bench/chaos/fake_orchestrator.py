"""Orchestrators that share their sessions, and do wrong in one way that the test chooses.

The real contract over real gRPC; the truth is a hash of the context, and there is no tier at all.
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
from outrider_bench.chaos.calls import Attempt, Orchestrators

VOCAB_SIZE = 300
_CHUNK = 3
_CHUNK_S = 0.002


def truth(token_ids: list[int]) -> int:
    """What comes after those."""
    return (token_ids[-1] * 31 + len(token_ids) * 7) % VOCAB_SIZE


@dataclass
class Session:
    token_ids: list[int]
    prompt_len: int
    max_tokens: int
    # Who may write: the last who took it; 0: nobody.
    holder: int = 0


@dataclass
class Shared:
    """The store of all, and what is wrong. `faults_left`: how often it still goes wrong."""

    wrong: str = ""
    faults_left: int = 1
    sessions: dict[str, Session] = field(default_factory=dict)
    num_calls: int = 0
    # Of each session: the calls that ask for it anew, as their callers see them.
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)

    def has_slow_rival(self, session_id: str, num_chunks: int) -> bool:
        """One who asks for the session, too, has fewer chunks, and may still get more."""
        return any(
            len(attempt.times) < num_chunks
            for attempt in self.attempts.get(session_id, ())
            if attempt.result is None and attempt.code is None
            if not attempt.has_left and not attempt.is_silent
        )

    def goes_wrong(self, how: str) -> bool:
        """Now, and as often as was chosen."""
        if self.wrong != how or self.faults_left == 0:
            return False
        self.faults_left -= 1
        return True


class Watched(Orchestrators):
    """Callers' connections that tell the store who asks for what."""

    def __init__(self, shared: Shared, channels: Sequence[grpc.aio.Channel]) -> None:
        super().__init__(channels)
        self._shared = shared

    async def attempt(
        self,
        attempt: Attempt,
        request: orchestrator_pb2.GenerateRequest,
        leaves_at: int | None = None,
    ) -> None:
        if not request.HasField("resume_from"):
            self._shared.attempts.setdefault(request.session_id, []).append(attempt)
        await super().attempt(attempt, request, leaves_at)


class FakeOrchestrator(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    def __init__(self, shared: Shared) -> None:
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
        if len(token_ids) > session.prompt_len + 4 and self._shared.goes_wrong("loses in Redis"):
            token_ids = token_ids[:-1]
        in_use = session.holder != 0
        return orchestrator_pb2.GetSessionResponse(token_ids=token_ids, in_use=in_use)

    async def DeleteSession(self, request: Any, context: Any) -> Any:
        self._shared.sessions.pop(request.session_id, None)
        return orchestrator_pb2.DeleteSessionResponse()

    async def Generate(self, request: orchestrator_pb2.GenerateRequest, context: Any) -> None:
        shared = self._shared
        shared.num_calls += 1
        caller, name = shared.num_calls, request.session_id or f"one-off {shared.num_calls}"
        if request.HasField("resume_from"):
            session, num_held = shared.sessions[name], request.resume_from
            if shared.goes_wrong("resumes a token late"):
                num_held += 1
        else:
            if name in shared.sessions and not shared.goes_wrong("serves two at once"):
                await context.abort(grpc.StatusCode.ABORTED, "in use")
            prompt = list(request.token_ids.ids)
            session, num_held = Session(prompt, len(prompt), request.sampling.max_tokens), 0
            shared.sessions[name] = session
        session.holder = caller
        try:
            await self._stream(session, caller, num_held, request.session_id, context)
        finally:
            if session.holder == caller:
                session.holder = 0

    async def _stream(
        self, session: Session, caller: int, num_shown: int, session_id: str, context: Any
    ) -> None:
        end, is_named = session.prompt_len + session.max_tokens, bool(session_id)
        for num_chunks in itertools.count():
            await asyncio.sleep(_CHUNK_S)
            # Else the one would be through before the other has come, if that one is slow.
            while self._shared.has_slow_rival(session_id, num_chunks):  # noqa: ASYNC110
                await asyncio.sleep(_CHUNK_S)
            if session.holder != caller:
                await context.abort(grpc.StatusCode.ABORTED, "taken by a later call")
            for _ in range(min(_CHUNK, end - len(session.token_ids))):
                session.token_ids.append(truth(session.token_ids))
            shown = session.token_ids[session.prompt_len + num_shown :]
            num_shown += len(shown)
            is_early = num_shown < session.max_tokens
            if is_named and shown and is_early:
                shown = await self._distorted(shown, context)
            await context.write(orchestrator_pb2.GenerateResponse(token_ids=shown))
            if not is_early:
                break
        await context.write(orchestrator_pb2.GenerateResponse(result=self._result(is_named)))

    async def _distorted(self, shown: list[int], context: Any) -> list[int]:
        shared = self._shared
        if shared.goes_wrong("loses a token"):
            return shown[:-1]
        if shared.goes_wrong("repeats a token"):
            return [*shown, shown[-1]]
        if shared.goes_wrong("changes a token"):
            return [*shown[:-1], (shown[-1] + 1) % VOCAB_SIZE]
        if shared.goes_wrong("fails"):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the target is gone")
        return shown

    def _result(self, is_named: bool) -> orchestrator_pb2.GenerateResult:
        reason = orchestrator_pb2.FINISH_REASON_LENGTH
        if is_named and self._shared.goes_wrong("gives a wrong reason"):
            reason = orchestrator_pb2.FINISH_REASON_STOP
        return orchestrator_pb2.GenerateResult(finish_reason=reason, recorded=True)


@contextlib.asynccontextmanager
async def faking(shared: Shared, num: int = 2) -> AsyncIterator[list[str]]:
    """host:port of each."""
    async with contextlib.AsyncExitStack() as stack:
        endpoints = []
        for _ in range(num):
            server = grpc.aio.server(options=SERVER_OPTIONS)  # callers ping as often as they do
            servicer = FakeOrchestrator(shared)
            orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(servicer, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, 0)
            endpoints.append(f"127.0.0.1:{port}")
        yield endpoints
