"""Connection to one orchestrator: its requests; their failures with an explanation for people."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from outrider.client.channel import Access, channel_opener
from outrider.client.diagnosis import connection_fault
from outrider.errors import CallFailed, Unavailable
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
# A frozen or cut off orchestrator sends no heartbeats: it is left after 10 s. One that starts 1,000
# streams on a busy machine was seen to need more than 5 s for its first message.
HEARTBEAT_MS = 2_000
_MAX_MISSED = 5
# A new generation tries an endpoint that failed last if its failure is more recent than this.
_AVOID_S = 10.0


class Connection:
    """Connection to one orchestrator, opened by its first request. For one event loop only."""

    def __init__(self, endpoint: str, access: Access | None = None) -> None:
        """Raises ConfigError for a malformed endpoint and for unusable files."""
        require_endpoint(endpoint, "endpoint")
        self.endpoint = endpoint
        self.is_closed = False
        self._access = access
        self._open = channel_opener(endpoint, access)
        self._channel: grpc.aio.Channel | None = None
        self._failed_at = -_AVOID_S

    @property
    def has_failed_lately(self) -> bool:
        return time.monotonic() < self._failed_at + _AVOID_S

    def note_failure(self) -> None:
        """Makes new generations try other endpoints first for a while."""
        self._failed_at = time.monotonic()

    async def close(self) -> None:
        """Cancels all requests and closes the channel."""
        self.is_closed = True
        if self._channel is not None:
            await self._channel.close(None)

    async def generate(
        self, request: orchestrator_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> AsyncGenerator[orchestrator_pb2.GenerateResponse, None]:
        """Messages of a generation, without heartbeats; closing it cancels the generation.

        It may be advanced from different tasks, one at a time. Raises CallFailed.
        """
        sent = orchestrator_pb2.GenerateRequest()
        sent.CopyFrom(request)
        sent.heartbeat_ms = HEARTBEAT_MS
        call: Any = self._stub().Generate(sent, timeout=timeout_s)
        try:
            async with contextlib.aclosing(listening(call)) as messages:
                async for message in messages:
                    yield message
        except Unavailable as error:
            raise CallFailed(f"UNAVAILABLE: {self.endpoint}: {error}") from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise CallFailed("CANCELLED: the client was closed") from None
        except grpc.aio.AioRpcError as error:
            raise await call_failed(error, self.endpoint, self._access) from error
        finally:
            call.cancel()  # leaving the loop does not cancel the request on the server

    async def send(self, method: str, request: Any) -> Any:
        """Response to a short request, by the name of its method. Raises CallFailed."""
        try:
            return await getattr(self._stub(), method)(request, timeout=SHORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise await call_failed(error, self.endpoint, self._access) from error

    def _stub(self) -> orchestrator_pb2_grpc.OrchestratorServiceStub:
        if self.is_closed:
            raise CallFailed("CANCELLED: the client is closed", was_delivered=False)
        if self._channel is None:
            self._channel = self._open()
        return orchestrator_pb2_grpc.OrchestratorServiceStub(self._channel)


async def listening(call: Any) -> AsyncGenerator[Any, None]:
    """Messages of a call with HEARTBEAT_MS, without the heartbeats.

    It may be advanced from different tasks, one at a time. Raises Unavailable when the server is
    gone.
    """
    silence = _Silence(call)
    try:
        async for message in call:
            silence.is_listening = False
            if message.ByteSize():
                yield message
            silence.restart()
    except (asyncio.CancelledError, grpc.aio.AioRpcError):
        if not silence.is_over or _is_cancelled():
            raise
        silent_s = HEARTBEAT_MS / 1000 * _MAX_MISSED
        raise Unavailable(f"no frame was received for {silent_s:g} s") from None
    finally:
        silence.stop()


def _is_cancelled() -> bool:
    """Whether the current task is being cancelled, rather than a call of it."""
    task = asyncio.current_task()
    return task is not None and bool(task.cancelling())


class _Silence:
    """Cancels a call whose peer sends nothing, not even heartbeats.

    Counts intervals, not time: while this process was stopped it could not receive. Only intervals
    of listening count.
    """

    def __init__(self, call: Any) -> None:
        self.is_listening, self.is_over = True, False
        self._call, self._num_missed = call, 0
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(HEARTBEAT_MS / 1000, self._tick)

    def restart(self) -> None:
        self.is_listening, self._num_missed = True, 0

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        self._num_missed += self.is_listening
        if self._num_missed >= _MAX_MISSED:
            self.is_over = True
            self._call.cancel()
        else:
            self._timer = self._loop.call_later(HEARTBEAT_MS / 1000, self._tick)


async def call_failed(
    error: grpc.aio.AioRpcError, endpoint: str, access: Access | None = None
) -> CallFailed:
    """The failure of a request, explained.

    Shows the message of the server or proxy. Without one, `connection_fault` finds what is wrong.
    """
    code, details = error.code().name, " ".join((error.details() or "").split())
    trailers: Any = error.trailing_metadata() or ()
    if any(key == _STATUS_DETAILS for key, _ in trailers):
        return _with_details(f"{code}: {details}", trailers)
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


def _with_details(message: str, trailers: Any) -> CallFailed:
    """The failure with the field or the time to wait that the server's rich status names."""
    from google.rpc import error_details_pb2, status_pb2

    status, field, retry_after_s = status_pb2.Status(), None, None
    for key, value in trailers:
        if key == _STATUS_DETAILS:
            status = status_pb2.Status.FromString(value)
    for detail in status.details:
        refused, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(refused) and refused.field_violations:
            field = refused.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return CallFailed(message, field=field, retry_after_s=retry_after_s)
