"""HTTP server: uvicorn on the event loop of the orchestrator, with its signals and its TLS."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from orchestrator.admission.api_keys import ApiKeys
from orchestrator.api.generate import STOP_GRACE_S, Generate
from orchestrator.api.request_telemetry import ApiTelemetry
from orchestrator.http.app import Scrape, http_app
from orchestrator.http.completions import Resources
from outrider.errors import ConfigError
from outrider.runtime.grpc_server import MAX_CONCURRENT_CALLS
from outrider.runtime.server_security import server_files
from outrider.security.files import WatchedFiles
from outrider.security.pem import Pem
from outrider.settings.security import ServerSettings
from outrider.settings.services import OrchestratorConfig

_BACKLOG = 2_048
# An idle connection is closed after this time: longer than the idle time of common proxies.
_KEEP_ALIVE_S = 75
_MAX_INT32 = (1 << 31) - 1
_SEND_BUFFER_BYTES = 65_536


def bound_socket(host: str, port: int, write_timeout_s: float) -> socket.socket:
    """A socket that has the port and does not listen yet. Raises ConfigError naming the setting.

    The system closes connections whose peers accept nothing for four times `write_timeout_s`: of
    those that ended with data in their buffers.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it: those of dead peers are closed in the end.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Otherwise the system buffers megabytes before it shows that a client does not read.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            limit_ms = min(int(4_000 * write_timeout_s), _MAX_INT32)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
        bound.bind((host.strip("[]"), port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"http_port: cannot listen on {host}:{port}: {error.strerror}") from error
    return bound


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """TLS by the settings that gRPC has, too; None: plain text. Raises ConfigError."""
    files = server_files(settings)
    if files is None:
        return None
    context = _ReloadedContext(ssl.PROTOCOL_TLS_SERVER)
    context.follow(files, settings)
    return context


class _ReloadedContext(ssl.SSLContext):
    """TLS context that uses the files as they are at each handshake, as gRPC does."""

    def follow(self, files: WatchedFiles[Pem], settings: ServerSettings) -> None:
        self._files = files
        self._settings = settings
        self._current = self._made()

    def _made(self) -> ssl.SSLContext:
        settings = self._settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        assert settings.tls_cert is not None, "there is TLS"
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.tls_client_ca is not None:
            context.load_verify_locations(settings.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        if self._files.refresh():
            with contextlib.suppress(OSError):  # the files changed again: the next handshake's
                self._current = self._made()
        return self._current.wrap_bio(*args, **options)


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """Connection that is known to its calls, which may have to abort it.

    It is closed if the headers of a request are not complete after `read_timeout_s`, or the rest of
    a request that has its answer. uvicorn bounds only the time between an answer and the next byte.
    """

    def __init__(self, *args: Any, read_timeout_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._read_timeout_s = read_timeout_s
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        state: dict[str, Any] = {"transport": transport}
        self.app_state = state
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_no_longer()
        elif self._reading is None:
            self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        self._wait_no_longer()
        super().connection_lost(error)

    def _wait(self) -> None:
        self._reading = self.loop.call_later(self._read_timeout_s, self.transport.close)

    def _wait_no_longer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to the program, and waits for `stopping` instead of polling."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self.stopping = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stopping.wait()


class HttpServer:
    """HTTP server of the orchestrator. It has its port from the start, and answers in `running`.

    Raises ConfigError if the port is not available, or for unusable certificates.
    """

    def __init__(
        self,
        settings: OrchestratorConfig,
        use_case: Generate,
        telemetry: ApiTelemetry,
        api_keys: ApiKeys | None,
        scrape: Scrape,
    ) -> None:
        """`api_keys` None: no key is required. `scrape`: answer of /metrics."""
        assert settings.http_port is not None, "there is HTTP"
        resources = Resources(use_case, telemetry, api_keys, settings)
        config = uvicorn.Config(
            http_app(resources, scrape),
            http=functools.partial(_Protocol, read_timeout_s=settings.http_read_timeout_s),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=_BACKLOG,
            limit_concurrency=MAX_CONCURRENT_CALLS,
            timeout_keep_alive=_KEEP_ALIVE_S,
            # Calls that take longer to end are cancelled.
            timeout_graceful_shutdown=math.ceil(settings.stop_grace_s + STOP_GRACE_S),
            # A call must not inherit the API key of the call before it on the same connection.
            reset_contextvars=True,
        )
        config.load()
        config.ssl = tls_context(settings)
        self._uvicorn = _Uvicorn(config)
        self._socket = bound_socket(settings.host, settings.http_port, settings.write_timeout_s)
        self.port = int(self._socket.getsockname()[1])
        self._serving: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answers for the block; then ends as `stop`."""
        async with asyncio.TaskGroup() as tasks:
            self._serving = tasks.create_task(self._uvicorn.serve([self._socket]), name="http")
            await self._uvicorn.listening.wait()
            try:
                yield
            finally:
                await self.stop()

    async def stop(self) -> None:
        """Accepts no new connection and closes idle ones; returns when all calls have ended."""
        self._uvicorn.stopping.set()
        if self._serving is not None:
            await asyncio.wait([self._serving])

    def close(self) -> None:
        """Gives up the port. For a server that may not have run."""
        self._socket.close()
