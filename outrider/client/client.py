"""Requests to the orchestrator; their failures with an explanation for people."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from outrider.client.channel import Access, open_channel
from outrider.client.diagnosis import connection_fault
from outrider.errors import CallFailed, ConfigError, InternalError, Unavailable
from outrider.runtime.heartbeat import CLIENT_HEARTBEAT_MS, listening
from outrider.settings.addresses import require_endpoint
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc

# Deadline of all requests but Generate.
SHORT_TIMEOUT_S = 10.0
# Starts of gRPC's own messages for a connection that could not be made, in lower case.
_NO_CONNECTION = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "dns resolution failed",
    "domain name not found",
    "name resolution failure",
    "errors resolving",
    "empty address list",
)
# gRPC's own messages for a connection that broke during a request, matched as a whole: a proxy may
# quote the same words about its own connection to an orchestrator.
_BROKEN = re.compile(
    r"stream removed \(.*\)|socket closed|transport closed|endpoint closing|broken pipe|"
    r"connection (reset( by peer)?|aborted)|(recvmsg|sendmsg):.*|(read|write) failed \(.*\)|"
    r"keepalive watchdog timeout|ping timeout|cancelling all calls|channel closed.*|"
    r"failed parsing http/2.*"
)
_TIMED_OUT = ("deadline exceeded", "stream removed (deadline exceeded)")
_HTTP_STATUS = re.compile(r"received http2 header with status: (\d+)")
# In the trailers of every error of an Outrider server (outrider.runtime.grpc_status).
_STATUS_DETAILS = "grpc-status-details-bin"


@dataclass
class Output:
    """Everything received in response to one Generate request."""

    session_id: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    logprobs: list[orchestrator_pb2.TokenLogprobs] = field(default_factory=list)
    result: orchestrator_pb2.GenerateResult = field(default_factory=orchestrator_pb2.GenerateResult)

    def add(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        """Appends a message of the stream."""
        self.session_id = chunk.session_id
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.origins += chunk.origins
        self.logprobs += chunk.logprobs
        if chunk.HasField("result"):
            self.result = chunk.result


Show = Callable[[orchestrator_pb2.GenerateResponse], None]


class Client:
    """Client of one orchestrator. `connected` makes it."""

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
        """Runs a generation; passes each message to `show` on arrival.

        Cancelling this coroutine cancels the generation. Raises CallFailed, and InternalError for a
        stream without a result.
        """
        output = Output()
        with_heartbeat = orchestrator_pb2.GenerateRequest()
        with_heartbeat.CopyFrom(request)
        with_heartbeat.heartbeat_ms = CLIENT_HEARTBEAT_MS
        call: Any = self._stub.Generate(with_heartbeat, timeout=timeout_s)
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
            call.cancel()  # leaving the loop does not cancel the request on the server
        if not output.result.finish_reason:
            raise InternalError("the orchestrator ended the stream without a result")
        return output

    async def get_session(self, session_id: str) -> orchestrator_pb2.GetSessionResponse:
        """Tokens and statistics of a session. Raises CallFailed."""
        request = orchestrator_pb2.GetSessionRequest(session_id=session_id)
        response: orchestrator_pb2.GetSessionResponse = await self._send(
            self._stub.GetSession, request
        )
        return response

    async def list_sessions(self) -> tuple[list[orchestrator_pb2.SessionSummary], int]:
        """All sessions of the API key, sorted by name, and the number of unreadable ones left out.

        Raises CallFailed.
        """
        # By name: a scan of Redis may return a session twice.
        found: dict[str, orchestrator_pb2.SessionSummary] = {}
        num_unreadable = 0
        request = orchestrator_pb2.ListSessionsRequest()
        while True:
            page = await self._send(self._stub.ListSessions, request)
            found |= {session.session_id: session for session in page.sessions}
            num_unreadable += page.num_unreadable
            if not page.next_page_token:
                return [found[name] for name in sorted(found)], num_unreadable
            request.page_token = page.next_page_token

    async def delete_session(self, session_id: str) -> None:
        """Deletes a session and its KV cache. Raises CallFailed."""
        request = orchestrator_pb2.DeleteSessionRequest(session_id=session_id)
        await self._send(self._stub.DeleteSession, request)

    async def model_info(self) -> orchestrator_pb2.GetModelInfoResponse:
        """The models that the orchestrator serves. Raises CallFailed."""
        response: orchestrator_pb2.GetModelInfoResponse = await self._send(
            self._stub.GetModelInfo, orchestrator_pb2.GetModelInfoRequest()
        )
        return response

    async def audit(self) -> orchestrator_pb2.GetAuditResponse:
        """Results of the orchestrator's losslessness audit. Raises CallFailed."""
        response: orchestrator_pb2.GetAuditResponse = await self._send(
            self._stub.GetAudit, orchestrator_pb2.GetAuditRequest()
        )
        return response

    async def _send(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=SHORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise await call_failed(error, self._endpoint, self._access) from error


async def call_failed(
    error: grpc.aio.AioRpcError, endpoint: str, access: Access | None = None
) -> CallFailed:
    """The failure of a request, explained.

    Shows the message of the server or proxy. Without one, `connection_fault` finds what is wrong.
    """
    code, details = error.code().name, " ".join((error.details() or "").split())
    trailers: Any = error.trailing_metadata() or ()
    if any(key == _STATUS_DETAILS for key, _ in trailers):
        return CallFailed(f"{code}: {details}")
    words = details.lower()
    if words in _TIMED_OUT:  # gRPC reports it with several status codes
        return CallFailed(f"DEADLINE_EXCEEDED: {endpoint} did not respond in time")
    if status := _HTTP_STATUS.search(words):
        return CallFailed(f"{code}: {_http_response(endpoint, status[1])}")
    if error.code() is grpc.StatusCode.CANCELLED:
        # Not by an orchestrator, whose errors have trailers: by a proxy, or by gRPC's core in a
        # server that stops, for requests that no handler has taken yet.
        return CallFailed(f"UNAVAILABLE: {endpoint} is stopping: it cancelled the request")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return CallFailed(
            f"{code}: {endpoint} is not an orchestrator of this version (a model service?): "
            f"{details}"
        )
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return CallFailed(f"{code}: {details}")
    if words.startswith(_NO_CONNECTION):
        why = await asyncio.to_thread(connection_fault, endpoint, access)
        why = why or f"{endpoint} could not be reached a moment ago, but can be now: try again"
        return CallFailed(f"{code}: {why}", was_delivered=False)
    if words and not _BROKEN.fullmatch(words):
        return CallFailed(
            f"{code}: {endpoint} answered: {details} (not an orchestrator's message: check the "
            "proxy or gateway there, and that the orchestrator behind it runs; then try again)"
        )
    why = await asyncio.to_thread(connection_fault, endpoint, access)
    why = why or "it responds again: try again"
    return CallFailed(f"{code}: the connection to {endpoint} broke; {why}")


def _http_response(endpoint: str, status: str) -> str:
    return (
        f"{endpoint} answered with HTTP status {status}: a proxy or gateway, not an orchestrator; "
        "check that it forwards gRPC (HTTP/2), and that the orchestrator behind it runs"
    )


@contextlib.asynccontextmanager
async def connected(endpoint: str, access: Access | None = None) -> AsyncIterator[Client]:
    """A client, which connects with its first request.

    Raises ConfigError for a malformed endpoint and for unusable files.
    """
    if "," in endpoint:
        raise ConfigError(
            f"--endpoint: {endpoint!r} is a list; only `outrider generate` takes several endpoints"
        )
    require_endpoint(endpoint, "--endpoint")
    async with open_channel(endpoint, access) as channel:
        yield Client(channel, endpoint, access)
