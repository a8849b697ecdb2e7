"""The session store while Redis is killed, frozen, full or absent, or its connection fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence

import pytest

from orchestrator.sessions import Lease, RoundRecord, SessionStore
from outrider.errors import LeaseLost, SessionInUse, Unavailable, UnreadableRecord
from outrider.redis.connection import Command, RedisConnection, Reply
from outrider.redis.embedded import RedisServer
from tests.orchestrator.sessions.parts import PER_ROUND, begin, leased, opened, round_of, tokens_of
from tests.redis_fixture import redis_command
from tests.stack import eventually

# Timeout of a store that must not time out: the test would fail by its own limit first.
ENDLESS_S = 600.0
# Timeout of a store whose server is frozen.
FROZEN_S = 0.5


async def is_back(store: SessionStore) -> None:
    await eventually(store.ping)


@contextlib.contextmanager
def frozen(server: RedisServer, store: SessionStore) -> Iterator[None]:
    """Freezes the server for the block, with a short timeout only meanwhile."""
    assert server.pid is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store._writer._connection, "_timeout_s", FROZEN_S)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(server.pid, signal.SIGCONT)


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Command]]:
    """All pipelines that stores have sent."""
    exchange, sent = RedisConnection.exchange, list[Sequence[Command]]()

    async def noted(link: RedisConnection, commands: Sequence[Command]) -> Sequence[Reply]:
        sent.append(commands)
        return await exchange(link, commands)

    monkeypatch.setattr(RedisConnection, "exchange", noted)
    return sent


async def test_a_killed_server_and_its_restart_are_noticed_at_once() -> None:
    """The connection ends, so nothing waits for a timeout."""
    with RedisServer() as server:
        async with opened(server.url, socket_timeout_s=ENDLESS_S) as store:
            lease = await leased(store)
            await begin(store, lease, [1])
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            for _ in range(3):
                with pytest.raises(Unavailable, match="redis at unix:///"):
                    await store.record(lease, round_of(2))
            assert not await store.ping()
            server.stop()
            server.start()
            await is_back(store)
            with pytest.raises(LeaseLost, match="lost by Redis"):
                await store.record(lease, round_of(2))
            assert (await leased(store)).epoch > lease.epoch


async def test_a_restart_between_calls_causes_no_error() -> None:
    with RedisServer() as server:
        async with opened(server.url) as store:
            first = await leased(store)
            server.stop()
            server.start()
            second = await leased(store)
            assert second.epoch > first.epoch


async def test_a_frozen_server_costs_a_timeout_and_loses_nothing(
    exchanges: list[Sequence[Command]],
) -> None:
    """It applies what it had received when it continues. Records sent again are applied once.

    One timeout for all, not one for each.
    """
    with RedisServer() as server:
        async with opened(server.url) as store:
            leases = [await leased(store, f"s{i}") for i in range(20)]
            exchanges.clear()
            with frozen(server, store):
                records = (store.record(lease, round_of(1, 2)) for lease in leases)
                results = await asyncio.gather(*records, return_exceptions=True)
            assert all(isinstance(r, Unavailable) for r in results)
            # Orchestrators of other tests may run in this process, with a Redis of their own.
            assert len([one for one in exchanges if b"session:{s" in repr(one).encode()]) == 1
            await is_back(store)
            for lease in leases:
                await store.record(lease, RoundRecord([1, 2, 3], PER_ROUND, None, None))
                record = await store.get(lease.session_id)
                assert record.token_ids.tolist() == [1, 2, 3]
                assert record.counters == PER_ROUND


async def test_an_unconfirmed_turn_must_be_sent_again_before_its_rounds() -> None:
    with RedisServer() as server:
        async with opened(server.url) as store:
            lease = await leased(store)
            with frozen(server, store), pytest.raises(Unavailable):
                await begin(store, lease, [1])
            await is_back(store)
            with pytest.raises(Unavailable, match="turn's prompt"):
                await store.record(lease, round_of(2))
            await begin(store, lease, [1])
            await store.record(lease, round_of(2))
            record = await store.get("s")
            assert (record.token_ids.tolist(), record.num_turns) == ([1, 2], 1)


async def test_a_server_that_cannot_write_is_unavailable(redis_url: str) -> None:
    async with opened(redis_url) as store:
        redis_command(redis_url, "CONFIG", "SET", "maxmemory", "1")
        try:
            with pytest.raises(Unavailable, match="maxmemory"):
                await leased(store)
        finally:
            redis_command(redis_url, "CONFIG", "SET", "maxmemory", "0")
        await leased(store)


@pytest.mark.parametrize("command", ["hset", "append", "set", "hincrby", "pexpire", "getrange"])
async def test_a_script_that_fails_in_the_middle_leaves_a_consistent_session(
    command: str, redis_url: str
) -> None:
    """Redis does not roll back a script that lacks the permission for one of its commands."""
    async with opened(redis_url, lease_ttl_s=0.001) as store:  # so that each lease has expired
        lease = await leased(store)
        await begin(store, lease, [1, 2, 3])
        await store.record(lease, round_of(4))
        with _denied(redis_url, command), contextlib.suppress(Unavailable):
            await store.record(lease, round_of(5, 6))
        seen = await tokens_of(store)
        assert seen in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6])
        second = await _next_lease(store)
        with _denied(redis_url, command), contextlib.suppress(Unavailable):
            await begin(store, second, [7], keep_len=2)
        assert await tokens_of(store) in (seen, [1, 2], [1, 2, 7])
        third = await _next_lease(store)
        kept = third.record.token_ids.tolist()
        await begin(store, third, [8], keep_len=len(kept))
        await store.record(third, round_of(9))
        assert await tokens_of(store) == [*kept, 8, 9]


@contextlib.contextmanager
def _denied(redis_url: str, command: str) -> Iterator[None]:
    assert redis_command(redis_url, "ACL", "SETUSER", "default", f"-{command}") == b"+OK"
    try:
        yield
    finally:
        assert redis_command(redis_url, "ACL", "SETUSER", "default", "+@all") == b"+OK"


async def _next_lease(store: SessionStore) -> Lease:
    while True:
        with contextlib.suppress(SessionInUse):
            return await leased(store)
        await asyncio.sleep(0.005)


# Errors in the words of Redis, in reply to a command or to a new connection.
ANSWERS = """
NOPERM this user has no permissions to run the 'evalsha' command
NOAUTH Authentication required.
WRONGPASS invalid username-password pair or user is disabled.
LOADING Redis is loading the dataset in memory
BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.
MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.
NOREPLICAS Not enough good replicas to write.
MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.
CLUSTERDOWN The cluster is down
TRYAGAIN Multiple keys request during rehashing of slot
MOVED 3999 127.0.0.1:6381
READONLY You can't write against a read only replica.
OOM command not allowed when used memory > 'maxmemory'.
UNBLOCKED force unblock from blocking operation, instance state changed
ERR max number of clients reached
ERR unknown command 'EVALSHA', with args beginning with:
ERR Error running script (call to f_1): @user_script:1: @user_script: 1: -READONLY You can't write.
SOMENEWCODE of a server that is not written yet
""".strip().splitlines()


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("from_the_start", [True, False])
async def test_every_error_of_the_servers_state_is_unavailable(
    answer: str, from_the_start: bool
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.startswith(b"*"):
                words = [await _word(reader) for _ in range(int(line[1:]))]
                is_well = words[0] not in (b"EVALSHA", b"EVAL") and not from_the_start
                writer.write(b"+PONG\r\n" if is_well else f"-{answer}\r\n".encode())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        store = SessionStore(f"redis://127.0.0.1:{port}")
        store._writer.start()
        try:
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await leased(store)
                assert store.is_away
        finally:
            await store.close()


async def _word(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readline())[1:])
    return (await reader.readexactly(size + 2))[:-2]


async def test_a_key_of_another_type_under_a_sessions_name_is_unreadable(
    store: SessionStore, redis_url: str
) -> None:
    """It is not an outage: the error names the session and the cause."""
    assert redis_command(redis_url, "SET", "outrider:session:{s}", "1") == b"+OK"
    for act in (leased(store), store.get("s"), store.delete("s")):
        with pytest.raises(UnreadableRecord, match=r"session s: .*another type"):
            await act
    assert not store.is_away
    assert (await leased(store, "t")).created


async def test_a_start_without_a_server_is_unavailable() -> None:
    store = SessionStore("redis://user:secret@127.0.0.1:1/0")
    with pytest.raises(Unavailable, match=r"redis://127\.0\.0\.1:1/0") as caught:
        await store.start()
    assert "secret" not in str(caught.value)


async def test_a_server_that_is_not_redis_is_unavailable() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(64)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as web:
        port = web.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable):
            await SessionStore(f"redis://127.0.0.1:{port}").start()


async def test_an_unexpected_error_of_the_connection_fails_one_batch(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands of the batch fail, and the next one is served."""
    exchange, failures = RedisConnection.exchange, iter([RuntimeError("closed transport")])

    async def failing(link: RedisConnection, commands: Sequence[Command]) -> Sequence[Reply]:
        for failure in failures:
            raise failure
        return await exchange(link, commands)

    monkeypatch.setattr(RedisConnection, "exchange", failing)
    with pytest.raises(Unavailable, match="closed transport"):
        await leased(store)
    assert (await leased(store)).created


@pytest.mark.slow
async def test_a_stall_of_this_process_does_not_count_as_a_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reply that arrived during the stall is in time."""
    with RedisServer() as server:
        async with opened(server.url) as store:
            assert await store.ping()
            monkeypatch.setattr(store._writer._connection, "_timeout_s", 2.0)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            asking = asyncio.create_task(store.ping())
            await asyncio.sleep(0.2)
            os.kill(server.pid, signal.SIGCONT)
            # Redis reads in the order of arrival: it has replied to the earlier command by then.
            assert redis_command(server.url, "PING") == b"+PONG"
            time.sleep(2.5)  # noqa: ASYNC251 (the whole process)
            assert await asking
