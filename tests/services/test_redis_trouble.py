"""Redis that answers with errors, or leaves, in the midst of an output.

The stream goes on as while Redis is away, and everything is recorded once Redis serves again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest

import orchestrator.emitter
from orchestrator.store import Lease, SessionStore
from outrider.redis_server import RedisServer
from outrider.v1 import orchestrator_pb2
from tests.redis_fixture import redis_command
from tests.services.parts import (
    GREEDY,
    Brake,
    Greedy,
    Pair,
    System,
    Tiers,
    both_tiers,
    nothing_held,
    refusal,
)
from tests.services.parts import orchestrating as orchestrating_at
from tests.stack import Output, eventually, request

pytestmark = pytest.mark.slow

PROMPT = [3, 1, 4, 1, 5]
NUM_TOKENS = 60
KEY = "outrider:session:{s}"
FIRST: dict[str, Any] = {"session_id": "s", "create_session": True}


@pytest.fixture
async def tiers(pair: Pair) -> AsyncIterator[Tiers]:
    async with both_tiers(pair, draft_kv=None) as tiers:
        yield tiers


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """Its own: the tests here make it unusable."""
    with RedisServer(keeps_data=True) as server:
        yield server


def send(redis: RedisServer, *commands: str) -> None:
    for command in commands:
        assert redis_command(redis.url, *command.split()).startswith((b"+", b":")), command


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
    """One connection for several commands."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(redis.url.removeprefix("unix://"))
        for command in commands:
            client.sendall(command.encode() + b"\r\n")
            assert client.recv(1000).startswith((b"+", b":")), command
        yield client


@contextlib.contextmanager
def _busy(redis: RedisServer) -> Iterator[None]:
    """A script of somebody else's never ends."""
    with _connected(redis, "CONFIG SET busy-reply-threshold 1") as client:
        client.sendall(b'EVAL "while true do end" 0\r\n')
        while not redis_command(redis.url, "PING").startswith(b"-BUSY"):
            pass
        yield
        send(redis, "SCRIPT KILL")


@contextlib.contextmanager
def _crowded(redis: RedisServer) -> Iterator[None]:
    """Others have all of its connections."""
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


TROUBLES: dict[str, Callable[[RedisServer], Any]] = {
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


@contextlib.asynccontextmanager
async def held_at(
    system: System, brake: Brake, output: Output, num_tokens: int, **fields: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """A call whose generation waits behind that many tokens, all of which were sent."""
    brake.set(num_tokens)
    asked = request(PROMPT, {**GREEDY, "max_tokens": NUM_TOKENS}, gamma=0, **fields)

    async def listen() -> None:
        async for chunk in system.client.Generate(asked, timeout=200):
            output.add(chunk)

    listening = asyncio.create_task(listen())
    try:
        await has_sent(listening, output, num_tokens)
        yield listening
    finally:
        brake.release()
        listening.cancel()
        await asyncio.wait([listening])


async def has_sent(listening: asyncio.Task[None], output: Output, num_tokens: int) -> None:
    async def sent() -> bool:
        if listening.done():
            listening.result()
        return len(output.token_ids) >= num_tokens

    await eventually(sent)


def goes_on(brake: Brake, num_tokens: int) -> None:
    """Up to that many tokens."""
    brake.release()
    brake.set(num_tokens)


async def recorded(system: System) -> orchestrator_pb2.GetSessionResponse:
    asked = orchestrator_pb2.GetSessionRequest(session_id="s")
    return await system.client.GetSession(asked, timeout=200)


async def serves(system: System) -> bool:
    """Whether the store has Redis again: it pauses for a moment after each failure."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        return bool((await recorded(system)).session_id)
    return False


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_a_stream_survives_every_refusal_of_redis(
    trouble: str, tiers: Tiers, redis: RedisServer, greedy: Greedy, brake: Brake
) -> None:
    output = Output()
    async with orchestrating_at(tiers, redis.url) as system:
        async with held_at(system, brake, output, 20, **FIRST) as listening:
            with TROUBLES[trouble](redis):
                goes_on(brake, 40)
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


@pytest.mark.parametrize("trouble", ["NOAUTH", "WRONGTYPE"])
async def test_a_stream_survives_what_stays_so(
    trouble: str,
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result says that not all of it is recorded."""
    monkeypatch.setattr(orchestrator.emitter, "_RELEASE_RETRY_S", 0.5)
    output = Output()
    async with (
        orchestrating_at(tiers, redis.url) as system,
        held_at(system, brake, output, 20, **FIRST) as listening,
    ):
        if trouble == "WRONGTYPE":
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


async def test_a_call_ends_with_its_last_token_though_redis_is_away(
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is owed is written behind it, when Redis is back."""
    monkeypatch.setattr(orchestrator.emitter, "_RELEASE_RETRY_S", 200.0)
    output = Output()
    async with orchestrating_at(tiers, redis.url) as system:
        async with held_at(system, brake, output, 20, **FIRST) as listening:
            redis.kill()
            brake.release()
            await listening  # while nobody starts it again
        assert output.result is not None
        assert not output.result.recorded
        redis.start()

        async def is_free() -> bool:
            return await serves(system) and not (await recorded(system)).in_use

        await eventually(is_free)
        session = await recorded(system)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
    assert list(session.token_ids) == PROMPT + output.token_ids


async def test_a_generation_begun_without_redis_goes_on_when_it_comes_back(
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of it is ever written, and the result says so."""
    renewals: list[Lease] = []
    renew = SessionStore.renew

    async def noted(store: SessionStore, lease: Lease) -> None:
        renewals.append(lease)
        await renew(store, lease)

    monkeypatch.setattr(SessionStore, "renew", noted)
    monkeypatch.setattr(orchestrator.emitter, "RENEW_INTERVAL_S", 0.05)
    output, later = Output(), Output()
    async with orchestrating_at(tiers, redis.url, without_redis="unrecorded") as system:
        redis.kill()
        async with held_at(system, brake, output, 20) as listening:
            redis.start()
            await eventually(lambda: can_create(system))
            async with held_at(system, brake, later, 20, **FIRST) as other:
                # A lease of a recorded one is renewed: so would have been the first one's.
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


@pytest.mark.parametrize("durability", ["DURABLE", "FAST"])
async def test_a_later_turn_goes_on_without_redis(
    durability: str, tiers: Tiers, redis: RedisServer, greedy: Greedy, brake: Brake
) -> None:
    """As a first one does; when Redis is back all of it is recorded."""
    mode = orchestrator_pb2.Durability.Value(f"DURABILITY_{durability}")
    output = Output()
    async with orchestrating_at(tiers, redis.url) as system:
        first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
        context = [*PROMPT, *first.token_ids, *PROMPT]
        later: dict[str, Any] = {"session_id": "s", "durability": mode}
        async with held_before_its_first(system, brake, output, **later) as listening:
            redis.kill()
            goes_on(brake, 40)
            await has_sent(listening, output, 40)
            redis.start()
            await eventually(lambda: serves(system))
            brake.release()
            await listening
        session = await recorded(system)
    assert output.token_ids == greedy(context, NUM_TOKENS)
    assert output.result is not None
    assert output.result.recorded
    assert list(session.token_ids) == context + output.token_ids
    assert session.num_turns == 2


@contextlib.asynccontextmanager
async def held_before_its_first(
    system: System, brake: Brake, output: Output, **fields: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """A later turn that has its lease, and no token."""
    before = (await recorded(system)).epoch
    async with held_at(system, brake, output, 0, **fields) as listening:

        async def has_its_lease() -> bool:
            return (await recorded(system)).epoch > before

        await eventually(has_its_lease)
        yield listening


async def test_a_later_turn_of_which_nothing_was_recorded_is_not_the_one_before(
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its caller holds tokens that Redis never had: the call is to be sent again, as a first one.

    Also when it asks twice, and when other calls have failed meanwhile.
    """
    monkeypatch.setattr(orchestrator.emitter, "_RELEASE_RETRY_S", 0.0)
    output = Output()
    async with orchestrating_at(tiers, redis.url) as second:
        async with orchestrating_at(tiers, redis.url) as system:
            first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
            async with held_before_its_first(system, brake, output, session_id="s") as listening:
                redis.kill()
                goes_on(brake, 3)
                await has_sent(listening, output, 3)
                listening.cancel()
                brake.release()
            await eventually(lambda: nothing_held(system))
        redis.start()
        await eventually(lambda: serves(second))
        for num_held in (3, 3, 5):
            refused = await refusal(resumed(second, num_held))
            assert refused.code is grpc.StatusCode.NOT_FOUND
            assert "send it again" in refused.message
        again = await second.generate(PROMPT, sampling={**GREEDY, "max_tokens": 9}, session_id="s")
        assert again.token_ids == greedy([*PROMPT, *first.token_ids, *PROMPT], 9)
        assert again.token_ids[:3] == output.token_ids[:3]
        told = await resumed(second, 3)
        assert told.token_ids == again.token_ids[3:]


@pytest.mark.parametrize("turn", ["a first turn", "a later turn"])
@pytest.mark.parametrize("has_left", [True, False])
async def test_a_turn_is_recorded_though_its_caller_has_asked_for_it_elsewhere(
    turn: str,
    has_left: bool,
    tiers: Tiers,
    redis: RedisServer,
    greedy: Greedy,
    brake: Brake,
) -> None:
    """Shown while Redis was away, and asked for before it was written: nothing is known of it yet.

    Then it is written, behind the lease of the call that found nothing, and can be resumed.
    """
    output, context = Output(), PROMPT
    async with (
        orchestrating_at(tiers, redis.url) as system,
        orchestrating_at(tiers, redis.url) as second,
    ):
        if turn == "a later turn":
            first = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": 5}, **FIRST)
            context = [*PROMPT, *first.token_ids, *PROMPT]
            begun = held_before_its_first(system, brake, output, session_id="s")
        else:
            begun = held_at(system, brake, output, 0, **FIRST)
        async with begun as listening:
            await eventually(lambda: in_use(system))
            redis.kill()
            goes_on(brake, 3)
            await has_sent(listening, output, 3)
            redis.start()
            await eventually(lambda: serves(second))
            for _ in range(2):
                refused = await refusal(resumed(second, 3))
                assert refused.code is grpc.StatusCode.NOT_FOUND
            if has_left:
                listening.cancel()
                await asyncio.wait([listening])
                await eventually(lambda: nothing_held(system))
                brake.release()
            else:
                brake.release()
                await listening
        held = output.token_ids if not has_left else output.token_ids[:3]
        told: list[Output] = []

        async def is_resumed() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                told.append(await resumed(second, len(held)))
            return bool(told)

        await eventually(is_resumed)
        assert held + told[0].token_ids == greedy(context, NUM_TOKENS)
        session = await recorded(second)
        assert list(session.token_ids) == context + greedy(context, NUM_TOKENS)


async def in_use(system: System) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        return (await recorded(system)).in_use
    return False


async def resumed(system: System, num_held: int) -> Output:
    output = Output()
    asked = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=num_held)
    async for chunk in system.client.Generate(asked, timeout=200):
        output.add(chunk)
    return output
