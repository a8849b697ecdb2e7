"""Redis that replies with errors, or is away, during an output.

The stream continues, and all tokens are recorded when Redis works again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import orchestrator.generation.recorder
from orchestrator.sessions import Lease, SessionStore
from outrider.redis.embedded import RedisServer
from outrider.v1 import orchestrator_pb2
from tests.redis_fixture import redis_command
from tests.services import redis_streams
from tests.services.parts import (
    Brake,
    Greedy,
    System,
    Tiers,
)
from tests.services.parts import orchestrating as orchestrating_at
from tests.services.redis_streams import (
    FIRST,
    KEY,
    NUM_TOKENS,
    PROMPT,
    continue_to,
    has_sent,
    paused_at,
    recorded,
    send,
    serves,
)
from tests.stack import Output, eventually

pytestmark = pytest.mark.slow

tiers, redis = redis_streams.tiers, redis_streams.redis


@contextlib.contextmanager
def _between(
    redis: RedisServer, first: tuple[str, ...], then: tuple[str, ...] = ()
) -> Iterator[None]:
    send(redis, *first)
    try:
        yield
    finally:
        send(redis, *then)


@contextlib.contextmanager
def _connected(redis: RedisServer, *commands: str) -> Iterator[socket.socket]:
    """Sends several commands on one connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(redis.url.removeprefix("unix://"))
        for command in commands:
            client.sendall(command.encode() + b"\r\n")
            assert client.recv(1000).startswith((b"+", b":")), command
        yield client


@contextlib.contextmanager
def _busy(redis: RedisServer) -> Iterator[None]:
    """Another client's script never ends."""
    with _connected(redis, "CONFIG SET busy-reply-threshold 1") as client:
        client.sendall(b'EVAL "while true do end" 0\r\n')
        while not redis_command(redis.url, "PING").startswith(b"-BUSY"):
            pass
        yield
        send(redis, "SCRIPT KILL")


@contextlib.contextmanager
def _crowded(redis: RedisServer) -> Iterator[None]:
    """Another client has the only connection."""
    with _connected(redis, "CONFIG SET maxclients 1", "CLIENT KILL TYPE normal") as client:
        yield
        client.sendall(b"CONFIG SET maxclients 1000\r\n")
        assert client.recv(1000) == b"+OK\r\n"


def _rights(lost: str) -> Callable[[RedisServer], Any]:
    return lambda redis: _between(
        redis, (f"ACL SETUSER default {lost}",), ("ACL SETUSER default +@all ~*",)
    )


def _setting(name: str, bad: str, good: str) -> Callable[[RedisServer], Any]:
    return lambda redis: _between(
        redis, (f"CONFIG SET {name} {bad}",), (f"CONFIG SET {name} {good}",)
    )


ERRORS: dict[str, Callable[[RedisServer], Any]] = {
    "NOPERM: scripts": _rights("-evalsha -eval"),
    "NOPERM: a command of a script": _rights("-hset"),
    "NOPERM: keys": _rights("resetkeys ~other:*"),
    "READONLY": lambda redis: _between(redis, ("REPLICAOF 127.0.0.1 1",), ("REPLICAOF NO ONE",)),
    "MASTERDOWN": lambda redis: _between(
        redis,
        ("CONFIG SET replica-serve-stale-data no", "REPLICAOF 127.0.0.1 1"),
        ("REPLICAOF NO ONE",),
    ),
    "NOREPLICAS": _setting("min-replicas-to-write", "1", "0"),
    "OOM": _setting("maxmemory", "1", "0"),
    "BUSY": _busy,
    "max number of clients": _crowded,
    "NOSCRIPT": lambda redis: _between(redis, ("SCRIPT FLUSH",)),
}


@pytest.mark.parametrize("error", ERRORS)
async def test_a_stream_continues_after_every_error_of_redis(
    error: str, tiers: Tiers, redis: RedisServer, greedy: Greedy, brake: Brake
) -> None:
    output = Output()
    async with orchestrating_at(tiers, redis.url) as system:
        async with paused_at(system, brake, output, 20, **FIRST) as listening:
            with ERRORS[error](redis):
                continue_to(brake, 40)
                await has_sent(listening, output, 40)
            await eventually(lambda: serves(system))
            brake.release()
            await listening
        session = await recorded(system)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
    assert output.result is not None
    assert output.result.recorded
    assert list(session.token_ids) == PROMPT + output.token_ids
    assert not session.in_use


@pytest.mark.parametrize("error", ["NOAUTH", "WRONGTYPE"])
async def test_a_stream_continues_while_an_error_of_redis_persists(
    error: str,
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result's `recorded` is false."""
    monkeypatch.setattr(orchestrator.generation.recorder, "_RELEASE_RETRY_S", 0.5)
    output = Output()
    async with (
        orchestrating_at(tiers, redis.url) as system,
        paused_at(system, brake, output, 20, **FIRST) as listening,
    ):
        if error == "WRONGTYPE":
            send(redis, f"SET {KEY} foreign")
        else:
            lock = ("ACL SETUSER default resetpass >secret", "CLIENT KILL TYPE normal")
            with _connected(redis, *lock):
                pass
        brake.release()
        await listening
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
    assert output.result is not None
    assert not output.result.recorded


async def test_a_call_ends_with_its_last_token_while_redis_is_away(
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its tokens are recorded later, when Redis is back."""
    monkeypatch.setattr(orchestrator.generation.recorder, "_RELEASE_RETRY_S", 200.0)
    output = Output()
    async with orchestrating_at(tiers, redis.url) as system:
        async with paused_at(system, brake, output, 20, **FIRST) as listening:
            redis.kill()
            brake.release()
            await listening  # while Redis is down
        assert output.result is not None
        assert not output.result.recorded
        redis.start()

        async def is_free() -> bool:
            return await serves(system) and not (await recorded(system)).in_use

        await eventually(is_free)
        session = await recorded(system)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
    assert list(session.token_ids) == PROMPT + output.token_ids


async def test_a_generation_begun_without_redis_stays_unrecorded(
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when Redis comes back; the result's `recorded` is false."""
    renewals: list[Lease] = []
    renew = SessionStore.renew

    async def noted(store: SessionStore, lease: Lease) -> None:
        renewals.append(lease)
        await renew(store, lease)

    monkeypatch.setattr(SessionStore, "renew", noted)
    monkeypatch.setattr(orchestrator.generation.recorder, "RENEW_INTERVAL_S", 0.05)
    output, later = Output(), Output()
    async with orchestrating_at(tiers, redis.url, without_redis="unrecorded") as system:
        redis.kill()
        async with paused_at(system, brake, output, 20) as listening:
            redis.start()
            await eventually(lambda: can_create(system))
            async with paused_at(system, brake, later, 20, **FIRST) as other:
                # The lease of the recorded one is renewed by now; the other has none.
                await eventually(lambda: _is_true(any(r.session_id == "s" for r in renewals)))
                brake.release()
                await asyncio.gather(listening, other)
    assert output.token_ids == later.token_ids == greedy(PROMPT, NUM_TOKENS)
    assert output.result is not None
    assert later.result is not None
    assert not output.result.recorded
    assert later.result.recorded
    assert {lease.session_id for lease in renewals} == {"s"}


async def _is_true(value: bool) -> bool:
    return value


async def can_create(system: System) -> bool:
    asked = orchestrator_pb2.GetSessionRequest(session_id="nobody")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await system.client.GetSession(asked, timeout=200)
    return error.value.code() is grpc.StatusCode.NOT_FOUND
