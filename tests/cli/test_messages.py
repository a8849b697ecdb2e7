"""What a newcomer is told where an address is not an orchestrator's: what is wrong, what to do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import grpc
import pytest
import trustme

from outrider.cli.client import call_failed, connected
from outrider.cli.failures import CallFailed
from outrider.cli.request import endpoints_of
from outrider.errors import ConfigError
from outrider.security.channel import Access
from tests.cli.processes import run
from tests.services.replicas import tier

# gRPC's parts and their addresses.
INTERNAL = ("ipv4:", "handshake", "subchannel", "last error", "Stream removed", "Errno", "UNKNOWN")
NOTHING = grpc.aio.Metadata()


async def told(endpoint: str, access: Access | None = None) -> str:
    with pytest.raises(CallFailed) as caught:
        async with connected(endpoint, access) as client:
            await client.model_info()
    said = str(caught.value)
    assert not any(word in said for word in INTERNAL), said
    return said


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that answers whatever it reads with this, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read(64)
            writer.write(answer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("endpoint", "said"),
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
def test_an_address_that_is_none(endpoint: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        endpoints_of(endpoint)
    assert str(caught.value).startswith(f"--endpoint: {endpoint!r} ")
    assert said in str(caught.value)


async def test_what_is_there_instead() -> None:
    assert await told("127.0.0.1:1") == (
        "UNAVAILABLE: nothing answers at 127.0.0.1:1; start it with: outrider up"
    )
    assert "no host is called 'nobody.invalid'" in await told("nobody.invalid:50051")
    async with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as endpoint:
        assert f"{endpoint} is an HTTP server (metrics?)" in await told(endpoint)
    async with answering(b"\x15\x03\x03\x00\x02\x02\x46") as endpoint:  # an alert of TLS
        assert f"{endpoint} does not answer without TLS: give --tls-ca" in await told(endpoint)
    async with tier() as target:
        endpoint = f"127.0.0.1:{target.server.port}"
        assert f"{endpoint} is no orchestrator of this version" in await told(endpoint)


async def test_tls_where_there_is_none() -> None:
    async with tier() as target:
        endpoint = f"127.0.0.1:{target.server.port}"
        with trustme.CA().cert_pem.tempfile() as ca:
            said = await told(endpoint, Access(tls_ca=ca))
    assert said == f"UNAVAILABLE: {endpoint} does not use TLS: leave out --tls-ca"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE])
async def test_a_stream_that_was_removed_for_its_deadline(code: grpc.StatusCode) -> None:
    details = "Stream removed (Deadline Exceeded)"
    error = grpc.aio.AioRpcError(code, NOTHING, NOTHING, details=details)
    said = str(await call_failed(error, "host:1"))
    assert said == "DEADLINE_EXCEEDED: host:1 has not answered in time"


async def test_a_connection_that_broke() -> None:
    code = grpc.StatusCode.UNAVAILABLE
    error = grpc.aio.AioRpcError(code, NOTHING, NOTHING, details="Socket closed")
    failed = await call_failed(error, "127.0.0.1:1")
    assert failed.was_heard
    assert "the connection to 127.0.0.1:1 broke; nothing answers at 127.0.0.1:1" in str(failed)


@pytest.mark.slow
def test_of_the_commands() -> None:
    """One line each, with status 2 where what was given is wrong."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, said in (
            (("model", "--endpoint=http://h:1"), "--endpoint: 'http://h:1' is a URL"),
            (("bench", "serve", "--endpoint=h"), "--endpoint: 'h' is not host:port"),
            (
                ("up", f"--port={port}"),
                f"cannot listen on 127.0.0.1:{port}: Address already in use;",
            ),
        ):
            ended = run(*words)
            assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended
            assert said in ended.stderr
