"""Calls of the orchestrator, and what their failures mean to a person. Prints nothing."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from outrider.client.channel import Access, open_channel
from outrider.client.diagnosis import check_endpoint, unconnected
from outrider.errors import CallFailed, ConfigError, InternalError, Unavailable
from outrider.runtime.heartbeat import CALLER_HEARTBEAT_MS, listening
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc

# The short calls read a few rows of Redis.
SHORT_TIMEOUT_S = 10.0
# How gRPC itself begins to report that it has no connection, in lower case.
_NO_CONNECTION = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "dns resolution failed",
    "domain name not found",
    "name resolution failure",
    "errors resolving",
    "empty address list",
)
# Its whole report of a connection that broke under a call. A proxy may quote the same words, of its
# own connection to an orchestrator: they are then only a part of what it says.
_BROKE = re.compile(
    r"stream removed \(.*\)|socket closed|transport closed|endpoint closing|broken pipe|"
    r"connection (reset( by peer)?|aborted)|(recvmsg|sendmsg):.*|(read|write) failed \(.*\)|"
    r"keepalive watchdog timeout|ping timeout|cancelling all calls|channel closed.*|"
    r"failed parsing http/2.*"
)
_TIMED_OUT = ("deadline exceeded", "stream removed (deadline exceeded)")
_HTTP_STATUS = re.compile(r"received http2 header with status: (\d+)")
# In the trailers of every error that one of our servers has raised (outrider.runtime.grpc_status).
_STATUS_DETAILS = "grpc-status-details-bin"


@dataclass
class Output:
    """All that one Generate call sent."""

    session_id: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    logprobs: list[orchestrator_pb2.TokenLogprobs] = field(default_factory=list)
    result: orchestrator_pb2.GenerateResult = field(default_factory=orchestrator_pb2.GenerateResult)

    def add(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        self.session_id = chunk.session_id
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.origins += chunk.origins
        self.logprobs += chunk.logprobs
        if chunk.HasField("result"):
            self.result = chunk.result


Show = Callable[[orchestrator_pb2.GenerateResponse], None]


class Client:
    """Made by `connected`."""

    def __init__(
        self, channel: grpc.aio.Channel, endpoint: str, access: Access | None = None
    ) -> None:
        self._stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        self._endpoint = endpoint
        self._access = access

    @property
    def endpoint(self) -> str:
        return self._endpoint

    async def generate(
        self,
        request: orchestrator_pb2.GenerateRequest,
        *,
        show: Show | None = None,
        timeout_s: float | None = None,
    ) -> Output:
        """Hands every message to `show` as it comes. Raises CallFailed; cancelled, it cancels."""
        output = Output()
        asked = orchestrator_pb2.GenerateRequest()
        asked.CopyFrom(request)
        asked.heartbeat_ms = CALLER_HEARTBEAT_MS
        call: Any = self._stub.Generate(asked, timeout=timeout_s)
        try:
            async with contextlib.aclosing(listening(call)) as chunks:
                async for chunk in chunks:
                    output.add(chunk)
                    if show is not None:
                        show(chunk)
        except Unavailable as error:
            raise CallFailed(f"UNAVAILABLE: {self._endpoint}: {error}") from error
        except grpc.aio.AioRpcError as error:
            raise await call_failed(error, self._endpoint, self._access) from error
        finally:
            call.cancel()  # leaving the loop does not cancel it: the server would go on
        if not output.result.finish_reason:
            raise InternalError("the orchestrator ended the stream without a result")
        return output

    async def get_session(self, session_id: str) -> orchestrator_pb2.GetSessionResponse:
        """Raises CallFailed."""
        request = orchestrator_pb2.GetSessionRequest(session_id=session_id)
        answer: orchestrator_pb2.GetSessionResponse = await self._ask(
            self._stub.GetSession, request
        )
        return answer

    async def sessions(self) -> tuple[list[orchestrator_pb2.SessionSummary], int]:
        """All sessions of the client by name, and the number of unreadable ones that are left out.

        Raises CallFailed.
        """
        found: dict[str, orchestrator_pb2.SessionSummary] = {}  # Redis may name one twice
        num_unreadable = 0
        request = orchestrator_pb2.ListSessionsRequest()
        while True:
            page = await self._ask(self._stub.ListSessions, request)
            found |= {session.session_id: session for session in page.sessions}
            num_unreadable += page.num_unreadable
            if not page.next_page_token:
                return [found[name] for name in sorted(found)], num_unreadable
            request.page_token = page.next_page_token

    async def delete_session(self, session_id: str) -> None:
        """Raises CallFailed."""
        request = orchestrator_pb2.DeleteSessionRequest(session_id=session_id)
        await self._ask(self._stub.DeleteSession, request)

    async def model_info(self) -> orchestrator_pb2.GetModelInfoResponse:
        """Raises CallFailed."""
        answer: orchestrator_pb2.GetModelInfoResponse = await self._ask(
            self._stub.GetModelInfo, orchestrator_pb2.GetModelInfoRequest()
        )
        return answer

    async def _ask(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=SHORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise await call_failed(error, self._endpoint, self._access) from error


async def call_failed(
    error: grpc.aio.AioRpcError, endpoint: str, access: Access | None = None
) -> CallFailed:
    """What the server or a proxy said; where nobody said anything, what is wrong and what to do."""
    code, said = error.code().name, " ".join((error.details() or "").split())
    trailers: Any = error.trailing_metadata() or ()
    if any(key == _STATUS_DETAILS for key, _ in trailers):
        return CallFailed(f"{code}: {said}")
    words = said.lower()
    if words in _TIMED_OUT:  # also of a stream that gRPC has removed for it
        return CallFailed(f"DEADLINE_EXCEEDED: {endpoint} has not answered in time")
    if status := _HTTP_STATUS.search(words):
        return CallFailed(f"{code}: {_answered_by_http(endpoint, status[1])}")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return CallFailed(
            f"{code}: {endpoint} is no orchestrator of this version (a model service?): {said}"
        )
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return CallFailed(f"{code}: {said}")
    if words.startswith(_NO_CONNECTION):
        why = await asyncio.to_thread(unconnected, endpoint, access)
        why = why or f"{endpoint} was not there a moment ago and is now: try again"
        return CallFailed(f"{code}: {why}", was_heard=False)
    if words and not _BROKE.fullmatch(words):
        return CallFailed(
            f"{code}: {endpoint} answered: {said} (not an orchestrator's words: check the proxy or "
            "gateway there, and that the orchestrator behind it runs; then try again)"
        )
    why = await asyncio.to_thread(unconnected, endpoint, access)
    why = why or "it answers again: try again"
    return CallFailed(f"{code}: the connection to {endpoint} broke; {why}")


def _answered_by_http(endpoint: str, status: str) -> str:
    return (
        f"{endpoint} answered with HTTP status {status}: a proxy or gateway, not an orchestrator; "
        "check that it forwards gRPC (HTTP/2), and that the orchestrator behind it runs"
    )


@contextlib.asynccontextmanager
async def connected(endpoint: str, access: Access | None = None) -> AsyncIterator[Client]:
    """Connects with the first call. Raises ConfigError for files that cannot be used."""
    if "," in endpoint:
        raise ConfigError(f"--endpoint: {endpoint!r} is several; only `generate` follows them")
    check_endpoint(endpoint)
    async with open_channel(endpoint, access) as channel:
        yield Client(channel, endpoint, access)
