"""Errors of a client whose address is not an orchestrator's: what is wrong, and what to do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from outrider.cli.request import endpoints_of
from outrider.client import AsyncClient
from outrider.client.channel import Access
from outrider.client.connection import call_failed
from outrider.errors import CallFailed, ConfigError
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.cli.processes import run
from tests.security.parts import Authority
from tests.services.replicas import tier

# Words of gRPC's own messages, which users must not see.
INTERNAL = ("ipv4:", "handshake", "subchannel", "last error", "Stream removed", "Errno", "UNKNOWN")
NOTHING = grpc.aio.Metadata()


async def failure(endpoint: str, access: Access | None = None) -> str:
    """The message of a request that fails."""
    with pytest.raises(CallFailed) as caught:
        async with AsyncClient(endpoint, access=access, resume_for_s=0) as client:
            await client.models()
    message = str(caught.value)
    assert not any(word in message for word in INTERNAL), message
    return message


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    """The address of a TCP server; at the end none of its connections is left."""
    tasks: set[asyncio.Task[Any]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs callbacks of connections as tasks"
        tasks.add(task)
        try:
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await asyncio.sleep(0)  # what was just accepted becomes a task
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that answers whatever it reads with this, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(64)
        writer.write(answer)
        await writer.drain()

    async with listening(serve) as endpoint:
        yield endpoint


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://127.0.0.1:50051", "is a URL; give host and port alone: 127.0.0.1:50051"),
        ("grpc://host:1/", "is a URL; give host and port alone: host:1"),
        ("127.0.0.1", "is not host:port, for instance 127.0.0.1:50051"),
        ("127.0.0.1:", "is not host:port"),
        (":50051", "is not host:port"),
        ("127.0.0.1:5x", "is not host:port"),
        ("127.0.0.1:70000", "is not host:port"),
    ],
)
def test_a_malformed_endpoint_is_refused(endpoint: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        endpoints_of(endpoint)
    assert str(caught.value).startswith(f"--endpoint: {endpoint!r} ")
    assert message in str(caught.value)


async def test_the_error_names_what_was_found_at_the_address() -> None:
    assert await failure("127.0.0.1:1") == (
        "UNAVAILABLE: nothing answers at 127.0.0.1:1; start it with: outrider up"
    )
    # Neither an address nor a possible name: no name server is asked.
    assert "no host is called '[::zz]'" in await failure("[::zz]:50051")
    async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as endpoint:
        assert f"{endpoint} is an HTTP server (metrics?)" in await failure(endpoint)
    async with answering(b"\x15\x03\x03\x00\x02\x02\x46") as endpoint:  # an alert of TLS
        assert f"{endpoint} does not answer without TLS: give --tls-ca" in await failure(endpoint)
    async with tier() as target:
        endpoint = f"127.0.0.1:{target.server.port}"
        assert f"{endpoint} is not an orchestrator of this version" in await failure(endpoint)


async def test_tls_with_a_server_without_tls() -> None:
    async with tier() as target:
        endpoint = f"127.0.0.1:{target.server.port}"
        with trustme.CA().cert_pem.tempfile() as ca:
            message = await failure(endpoint, Access(tls_ca=ca))
    assert message == f"UNAVAILABLE: {endpoint} does not use TLS: leave out --tls-ca"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE])
async def test_a_stream_removed_after_its_deadline_is_deadline_exceeded(
    code: grpc.StatusCode,
) -> None:
    details = "Stream removed (Deadline Exceeded)"
    error = grpc.aio.AioRpcError(code, NOTHING, NOTHING, details=details)
    message = str(await call_failed(error, "host:1"))
    assert message == "DEADLINE_EXCEEDED: host:1 did not respond in time"


async def test_a_broken_connection_is_diagnosed() -> None:
    code = grpc.StatusCode.UNAVAILABLE
    error = grpc.aio.AioRpcError(code, NOTHING, NOTHING, details="Socket closed")
    failed = await call_failed(error, "127.0.0.1:1")
    assert failed.was_delivered
    assert "the connection to 127.0.0.1:1 broke; nothing answers at 127.0.0.1:1" in str(failed)


async def test_a_foreign_cancellation_is_unavailable() -> None:
    """gRPC's core cancels requests that arrive while a server stops."""
    code = grpc.StatusCode.CANCELLED
    error = grpc.aio.AioRpcError(code, NOTHING, NOTHING, details="CANCELLED")
    failed = await call_failed(error, "host:1")
    assert str(failed) == "UNAVAILABLE: host:1 is stopping: it cancelled the request"
    assert failed.was_delivered


async def test_a_cancellation_by_an_orchestrator_keeps_its_status() -> None:
    code = grpc.StatusCode.CANCELLED
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", b""))
    error = grpc.aio.AioRpcError(code, NOTHING, trailers, details="unread for 30 s")
    assert str(await call_failed(error, "host:1")) == "CANCELLED: unread for 30 s"


class Gateway(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Fails every short request with its own message, as a proxy does; a Generate never ends."""

    def __init__(self, code: grpc.StatusCode, words: str) -> None:
        self._code = code
        self._words = words
        self.has_started = asyncio.Event()

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        await context.abort(self._code, self._words)

    async def Generate(self, request: Any, context: Any) -> Any:
        self.has_started.set()
        yield orchestrator_pb2.GenerateResponse(text="a")
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def serving(
    words: str = "no healthy upstream",
    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[tuple[int, Gateway, grpc.aio.Server]]:
    server, gateway = grpc.aio.server(), Gateway(code, words)
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(gateway, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port, gateway, server
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def forwarding(port: int) -> AsyncIterator[tuple[str, set[asyncio.StreamWriter]]]:
    """Forwards bytes in both directions; yields its address and the connections to break."""
    writers: set[asyncio.StreamWriter] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far, far_writer = await asyncio.open_connection("127.0.0.1", port)
        writers.add(writer)
        await asyncio.gather(pump(reader, far_writer), pump(far, writer))

    async with listening(serve) as endpoint:
        yield endpoint.replace("127.0.0.1", "localhost"), writers


def server_credentials(
    authority: Authority, *names: str, client_ca: str | None = None
) -> grpc.ServerCredentials:
    cert, key = (Path(path).read_bytes() for path in authority.issue(names[0], *names))
    roots = None if client_ca is None else Path(client_ca).read_bytes()
    return grpc.ssl_server_credentials([(key, cert)], roots, client_ca is not None)


async def failure_of_a_broken_stream(
    endpoint: str, access: Access | None, gateway: Gateway, cut: Any
) -> str:
    """The message for a stream that `cut` breaks after its first message."""
    async with AsyncClient(endpoint, access=access, resume_for_s=0) as client:
        call = asyncio.create_task(client.generate("").result())
        await gateway.has_started.wait()
        await cut()
        with pytest.raises(CallFailed) as caught:
            await call
    assert caught.value.was_delivered
    message = str(caught.value)
    assert not any(word in message for word in INTERNAL), message
    return message


async def test_a_failed_handshake_is_named(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    access = Access(tls_ca=ours.ca)
    async with serving(credentials=server_credentials(ours, "localhost")) as (port, _, _):
        endpoint = f"localhost:{port}"
        assert await failure(endpoint, Access(tls_ca=other.ca)) == (
            f"UNAVAILABLE: no TLS with {endpoint}: its certificate is not signed by the authority "
            "in --tls-ca"
        )
        assert "its certificate is for another host name" in await failure(
            f"127.0.0.1:{port}", access
        )
    wants = server_credentials(ours, "localhost", client_ca=ours.ca)
    async with serving(credentials=wants) as (port, _, _):
        endpoint = f"localhost:{port}"
        message = await failure(endpoint, access)
        assert "it requires a client certificate: give --tls-cert and --tls-key" in message
        cert, key = other.issue("stranger")
        message = await failure(endpoint, Access(tls_ca=ours.ca, tls_cert=cert, tls_key=key))
        assert "it refuses the certificate in --tls-cert" in message
    async with serving() as (port, _, _):
        assert "does not use TLS: leave out --tls-ca" in await failure(f"localhost:{port}", access)


@pytest.mark.parametrize("has_tls", [True, False])
async def test_a_stream_broken_after_a_good_handshake(has_tls: bool, tmp_path: Path) -> None:
    """Broken by a firewall in between, and by the server's end: certificates are not mentioned."""
    authority = Authority(tmp_path / "pki")
    access = Access(tls_ca=authority.ca) if has_tls else None
    credentials = server_credentials(authority, "localhost") if has_tls else None
    async with serving(credentials=credentials) as (port, gateway, server):
        async with forwarding(port) as (endpoint, writers):

            async def cut() -> None:
                for writer in writers:
                    writer.transport.abort()

            message = await failure_of_a_broken_stream(endpoint, access, gateway, cut)
            assert message == (
                f"UNAVAILABLE: the connection to {endpoint} broke; it responds again: try again"
            )
        gateway.has_started.clear()
        endpoint = f"localhost:{port}"
        message = await failure_of_a_broken_stream(
            endpoint, access, gateway, lambda: server.stop(0)
        )
        assert message == (
            f"UNAVAILABLE: the connection to {endpoint} broke; nothing answers at {endpoint}; "
            "start it with: outrider up"
        )


@pytest.mark.parametrize("has_tls", [True, False])
@pytest.mark.parametrize(
    "words",
    [
        "no healthy upstream",
        "upstream connect error or disconnect/reset before headers. reset reason: remote "
        "connection failure, transport failure reason: delayed connect error: Connection refused",
        "TLS handshake with backend 10.0.0.7 failed: certificate has expired",
        "deadline exceeded while waiting for a backend",
    ],
)
async def test_a_proxys_own_message_is_shown(words: str, has_tls: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki")
    access = Access(tls_ca=authority.ca) if has_tls else None
    credentials = server_credentials(authority, "localhost") if has_tls else None
    async with serving(words, credentials=credentials) as (port, _, _):
        with pytest.raises(CallFailed) as caught:
            async with AsyncClient(f"localhost:{port}", access=access) as client:
                await client.models()
    message = str(caught.value)
    assert message.startswith(f"UNAVAILABLE: localhost:{port} answered: {words} (")
    assert "check the proxy or gateway" in message
    assert caught.value.was_delivered


async def test_a_proxys_message_with_another_status() -> None:
    async with serving("no route /outrider.v1", grpc.StatusCode.UNIMPLEMENTED) as (port, _, _):
        assert "no route /outrider.v1" in await failure(f"127.0.0.1:{port}")
    async with serving("quota of team 7", grpc.StatusCode.RESOURCE_EXHAUSTED) as (port, _, _):
        assert await failure(f"127.0.0.1:{port}") == "RESOURCE_EXHAUSTED: quota of team 7"


async def test_a_gateways_http_status_is_shown() -> None:
    """The gateway answers with HTTP/2 headers alone: a status and the end of the stream."""
    settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    status = b"\x08\x03503"  # the name `:status` by its index, then the value
    headers = len(status).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + status

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)  # the preface
        writer.write(settings)
        while True:
            frame = await reader.readexactly(9)
            await reader.readexactly(int.from_bytes(frame[:3], "big"))
            if frame[3] == 1:  # headers
                writer.write(headers)

    async with listening(serve) as endpoint:
        message = await failure(endpoint)
    assert f"UNAVAILABLE: {endpoint} answered with HTTP status 503: a proxy or gateway" in message


async def test_a_server_that_closes_connections_is_not_mistaken_for_tls() -> None:
    async with answering(b"") as endpoint:
        assert f"{endpoint} closes connections without an answer" in await failure(endpoint)


@pytest.mark.slow
def test_commands_print_one_line_and_exit_with_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in (
            (("model", "--endpoint=http://h:1"), "--endpoint: 'http://h:1' is a URL"),
            (("bench", "serve", "--endpoint=h"), "--endpoint: 'h' is not host:port"),
            (
                ("up", f"--port={port}"),
                f"cannot listen on 127.0.0.1:{port}: Address already in use;",
            ),
        ):
            ended = run(*words)
            assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended
            assert message in ended.stderr
