"""A real Redis for tests.

A module makes the fixtures its own by assignment (`redis_url = redis_fixture.redis_url`; both, for
one needs the other): imported by name they would look unused.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from outrider.redis.embedded import RedisServer


def redis_command(url: str, *words: str) -> bytes:
    """The reply as it is on the wire, without its last line end. For what the store has no word."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(url.removeprefix("unix://"))
        client.sendall(" ".join(words).encode() + b"\r\n")
        return client.recv(1 << 16).removesuffix(b"\r\n")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One for all tests; a test that stops or freezes one starts its own."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Of an empty database."""
    assert redis_command(redis_server.url, "FLUSHALL") == b"+OK"
    return redis_server.url
