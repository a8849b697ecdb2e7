"""gRPC server: port, health, reflection, services added after start, stop signals."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from outrider import errors
from outrider.runtime.grpc_options import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from outrider.runtime.grpc_status import translated
from outrider.runtime.message_limits import bounded
from outrider.runtime.server_security import UNPROTECTED, ServerProtection

# More than an orchestrator's generations: excess requests are rejected with a reason, not queued.
MAX_CONCURRENT_CALLS = 4_096
# Calls of all connections that the event loop has not accepted yet. gRPC cancels those beyond it
# without counting them, so it is far above any normal burst.
MAX_PENDING_CALLS = 65_536

# Health service name of liveness probes. Readiness probes use "" and the services' names.
LIVENESS = "liveness"
# The orchestrator's health name for whether sessions can be recorded now (docs/adr/0014).
REDIS = "redis"

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Per connection. Calls beyond it wait at the client, within their deadlines.
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_CALLS),
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    ("grpc.so_reuseport", 0),  # otherwise two servers silently share a port
    # Clients may ping more often than gRPC allows by default. Ours do not.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.keepalive_permit_without_calls", 1),
)


class _Services(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Methods that can be added after the server has started; UNAVAILABLE until then.

    gRPC itself would answer UNIMPLEMENTED, after which clients do not retry.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        # What the service waits for while it starts; named in the error message.
        self.awaited = ""
        self._handlers: list[grpc.GenericRpcHandler[Any, Any]] = []
        self._bounded: dict[str, Any] = {}

    def add_generic_rpc_handlers(
        self, handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]
    ) -> None:
        """Same interface as grpc.aio.Server."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Same interface as grpc.aio.Server: the same methods again, for a faster look-up."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        found = (handler.service(details) for handler in self._handlers)
        handler = next((method for method in found if method is not None), None)
        if handler is None and not self._handlers and details.method.split("/")[1] in self._names:
            return grpc.stream_stream_rpc_method_handler(self._starting)
        if handler is not None and details.method not in self._bounded:
            self._bounded[details.method] = bounded(handler, details.method)
        return self._bounded.get(details.method)

    async def _starting(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        reason = f": waiting for {self.awaited}" if self.awaited else ""
        async with translated(context):
            raise errors.Unavailable(f"the service is starting{reason}")


class Server:
    """gRPC server with health and reflection. Lives on one event loop.

    Servicers are added to `services`, before or after `start`.
    """

    def __init__(
        self,
        service_names: Sequence[str],
        protection: ServerProtection = UNPROTECTED,
        *,
        connection_age_s: float = 0.0,
        connection_age_grace_s: float = 0.0,
    ) -> None:
        """`connection_age_s`: a connection of this age accepts no new calls; 0: no limit.

        It closes with its last call, or `connection_age_grace_s` later. This lets clients that
        balance over connections find new servers.
        """
        age = _age_options(connection_age_s, connection_age_grace_s)
        self.grpc_server = grpc.aio.server(
            options=(*SERVER_OPTIONS, *age), interceptors=protection.interceptors
        )
        self._protection = protection
        self._service_names = tuple(service_names)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        common = _Services(())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, common)
        names = (*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            reflection.aio.ReflectionServicer(names),  # type: ignore[attr-defined]
            common,
        )
        self.services = _Services(self._service_names)
        self.grpc_server.add_generic_rpc_handlers((common, self.services))
        self.port = 0
        # Plain-text port for probes without TLS; serves health only.
        self._health_server: grpc.aio.Server | None = None
        self.health_port: int | None = None
        # Port of HTTP /metrics, if there is one (outrider.telemetry).
        self.metrics_port: int | None = None
        # Port of OpenAI-compatible HTTP, if there is one (orchestrator.http).
        self.http_port: int | None = None

    async def start(self, host: str, port: int) -> None:
        """Listens, not serving yet (health). Raises ConfigError if the port is not available."""
        credentials = self._protection.credentials
        self.port = _listen(self.grpc_server, host, port, credentials)
        if self._protection.health_port is not None:
            self._health_server = grpc.aio.server(options=SERVER_OPTIONS)
            services = _Services(())
            health_pb2_grpc.add_HealthServicer_to_server(self._health, services)
            self._health_server.add_generic_rpc_handlers((services,))
            health_port = self._protection.health_port
            self.health_port = _listen(self._health_server, host, health_port, None, "health_port")
        await self.set_serving(False)
        await self.set_alive(True)
        await self.grpc_server.start()
        if self._health_server is not None:
            await self._health_server.start()

    async def set_serving(self, serving: bool) -> None:
        """Sets the readiness of each service and of the whole server ("")."""
        for name in ("", *self._service_names):
            await self.set_health(name, serving)

    async def set_alive(self, alive: bool) -> None:
        """Sets liveness. False means that only a restart can help."""
        await self.set_health(LIVENESS, alive)

    async def set_health(self, name: str, is_healthy: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set(name, status.SERVING if is_healthy else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        await self.set_serving(False)
        await self.grpc_server.stop(grace_s)
        if self._health_server is not None:  # last, so that probes see the shutdown
            await self._health_server.stop(0)


def _age_options(age_s: float, grace_s: float) -> tuple[tuple[str, int], ...]:
    if not age_s:
        return ()
    return (
        ("grpc.max_connection_age_ms", math.ceil(1000 * age_s)),
        ("grpc.max_connection_age_grace_ms", math.ceil(1000 * grace_s)),
    )


def _listen(
    server: grpc.aio.Server,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None,
    name: str = "port",
) -> int:
    """Binds the port and returns its number. Raises ConfigError naming the setting."""
    _check_port(host, port, name)
    address = f"{host}:{port}"
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise errors.ConfigError(f"{name}: cannot listen on {address}; is it in use?") from error


def _check_port(host: str, port: int, name: str) -> None:
    """Binds the port once to get the system's error; gRPC only prints it to standard error."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as error:
        why = error.strerror
        raise errors.ConfigError(f"{name}: cannot listen on {host}:{port}: {why}") from error


def stop_signal() -> asyncio.Event:
    """An event set at SIGTERM or SIGINT. From now on the signals have no other effect."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped
