"""gRPC's edges shared by the three servers: status of errors, server life, channel settings.

The only place where an error of `outrider.errors` becomes a gRPC status. Knows no service's logic.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from outrider import errors

log = structlog.get_logger()

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# A frozen peer is noticed after keepalive_time + ping timeout (facts.md §2: without
# ping_timeout_ms it takes a minute).
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # else two servers silently share a port
    # Must allow the clients' keepalive_time_ms, or they are sent away for too many pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

_STATUS: tuple[tuple[type[errors.OutriderError], int], ...] = (
    (errors.InvalidRequest, code_pb2.INVALID_ARGUMENT),
    (errors.SessionNotFound, code_pb2.NOT_FOUND),
    (errors.SessionInUse, code_pb2.ABORTED),
    (errors.LeaseLost, code_pb2.ABORTED),
    (errors.CapacityExceeded, code_pb2.RESOURCE_EXHAUSTED),
    (errors.KVLost, code_pb2.UNAVAILABLE),
    (errors.Unavailable, code_pb2.UNAVAILABLE),
    (errors.ConfigError, code_pb2.FAILED_PRECONDITION),
)

RETRY_HINT_S = 1


def status_of(error: errors.OutriderError) -> status_pb2.Status:
    """The rich status of an error: a field violation or a retry hint where there is one."""
    code = next((c for kind, c in _STATUS if isinstance(error, kind)), code_pb2.INTERNAL)
    status = status_pb2.Status(code=code, message=str(error))
    detail = any_pb2.Any()
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.why
        )
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        status.details.append(detail)
    elif isinstance(error, errors.CapacityExceeded):
        delay = duration_pb2.Duration(seconds=RETRY_HINT_S)
        detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status.details.append(detail)
    return status


@contextlib.asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Ends the call with the status of an OutriderError raised inside, alone or by a TaskGroup.

    Ends it quietly where the caller has gone in the midst of a write.
    """
    try:
        yield
    except errors.OutriderError as error:
        await _abort(context, error)
    except BaseExceptionGroup as group:
        known = _first_known(group)
        if known is not None:
            await _abort(context, known)
        elif group.split(grpc.aio.InternalError)[1] is not None:
            raise
    except grpc.aio.InternalError:  # a write to a caller that has gone
        pass


def _first_known(group: BaseExceptionGroup[BaseException]) -> errors.OutriderError | None:
    for error in group.exceptions:
        found = _first_known(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, errors.OutriderError):
            return found
    return None


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.OutriderError) -> None:
    status = status_of(error)
    if status.code == code_pb2.INTERNAL:
        log.error("call_failed", error=str(error), exc_info=error)
    await context.abort_with_status(rpc_status.to_status(status))  # type: ignore[attr-defined]


class _Services(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Methods that may be added to a server that listens already; UNAVAILABLE until then.

    gRPC itself would say UNIMPLEMENTED, which tells callers never to ask again.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._handlers: list[grpc.GenericRpcHandler[Any, Any]] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """As grpc.aio.Server's."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """As grpc.aio.Server's: the same methods once more, for a faster look-up."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        found = (handler.service(details) for handler in self._handlers)
        handler = next((method for method in found if method is not None), None)
        if handler is None and not self._handlers and details.method.split("/")[1] in self._names:
            return grpc.stream_stream_rpc_method_handler(_not_yet)
        return handler


async def _not_yet(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "the service is starting")


class Server:
    """A gRPC server with health and reflection. Lives on one event loop.

    Servicers are added to `services`, before or after `start`.
    """

    def __init__(self, service_names: Sequence[str]) -> None:
        self.grpc_server = grpc.aio.server(options=SERVER_OPTIONS)
        self._service_names = tuple(service_names)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        reflection.enable_server_reflection(
            (*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc_server
        )
        self.services = _Services(self._service_names)
        self.grpc_server.add_generic_rpc_handlers((self.services,))
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listens, not yet serving (health). Raises ConfigError if the port cannot be had."""
        _check_port(host, port)
        try:
            self.port = self.grpc_server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise errors.ConfigError(
                f"port: cannot listen on {host}:{port}; is it in use?"
            ) from error
        await self.set_serving(False)
        await self.grpc_server.start()

    async def set_serving(self, serving: bool) -> None:
        """What readiness probes of each service's name and of "" are told."""
        status = health_pb2.HealthCheckResponse
        value = status.SERVING if serving else status.NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, value)

    async def stop(self, grace_s: float) -> None:
        await self.set_serving(False)
        await self.grpc_server.stop(grace_s)


def _check_port(host: str, port: int) -> None:
    """The system says why a port cannot be had; gRPC says that to standard error only."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as error:
        why = error.strerror
        raise errors.ConfigError(f"port: cannot listen on {host}:{port}: {why}") from error


async def until_signalled() -> None:
    """Returns at SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


Item = TypeVar("Item")


class Outbox(Generic[Item]):
    """What a stream still has to send: writers never wait, the stream takes all that is pending.

    Bounded by its users: at most one answer is due for each request on the stream.
    """

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, items: Iterable[Item]) -> None:
        self._items.extend(items)
        self._ready.set()

    def close(self) -> None:
        """Ends `batches` once all is taken."""
        self._closed = True
        self._ready.set()

    async def batches(self) -> AsyncIterator[list[Item]]:
        """Everything pending, again and again; one consumer."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            items, self._items = self._items, []
            if items:
                yield items
            elif self._closed:
                return


class StreamCall(Generic[Item]):
    """The reading half of a bidirectional stream, beside the handler that writes.

    `read` gets each frame and may wait: the peer is then held by flow control. At the stream's end
    the outbox is closed, so that the writing half ends too. Raises on exit what `read` raised.
    """

    def __init__(
        self,
        frames: AsyncIterator[Item],
        read: Callable[[Item], Awaitable[None]],
        outbox: Outbox[Any],
    ) -> None:
        self._frames = frames
        self._read = read
        self._outbox = outbox

    async def _pump(self) -> None:
        try:
            async for frame in self._frames:
                await self._read(frame)
        finally:
            self._outbox.close()

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._pump())

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._task.cancel()
        (result,) = await asyncio.gather(self._task, return_exceptions=True)
        if error is None and isinstance(result, Exception):
            raise result
