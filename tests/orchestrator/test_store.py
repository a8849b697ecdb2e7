"""Sessions in a real Redis: leases, fencing, tokens, repeats, and Redis going away."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator.store import (
    Counters,
    KvHandle,
    Lease,
    RoundRecord,
    SessionStore,
    StoreOptions,
    validate_session_id,
)
from outrider.errors import (
    ConfigError,
    InternalError,
    InvalidRequest,
    LeaseLost,
    SessionInUse,
    SessionNotFound,
    Unavailable,
)
from outrider.redis_link import Command, Link, Reply
from outrider.redis_server import RedisServer, answers, find_server
from tests import redis_fixture
from tests.redis_fixture import redis_command

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url

Ids = Sequence[int] | npt.NDArray[np.uint32]
MODEL = "target-fp/draft-fp"
PER_ROUND = Counters(num_drafts=1, num_draft_tokens=4, num_accepted_tokens=2, num_emitted_tokens=3)


@asynccontextmanager
async def opened(url: str, **options: float | str) -> AsyncIterator[SessionStore]:
    store = SessionStore(url, StoreOptions(**options))  # type: ignore[arg-type]
    await store.start()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[SessionStore]:
    async with opened(redis_url) as store:
        yield store


async def begin(store: SessionStore, lease: Lease, token_ids: Ids, keep_len: int = 0) -> None:
    await store.begin_turn(lease, token_ids, keep_len=keep_len, messages=[], turn_json="{}")


async def leased(store: SessionStore, session_id: str = "s") -> Lease:
    return await store.acquire(session_id, create=True, model=MODEL)


def round_of(*token_ids: int, kv: KvHandle | None = None) -> RoundRecord:
    return RoundRecord(token_ids, PER_ROUND, target_kv=kv, draft_kv=None)


async def tokens_of(store: SessionStore, session_id: str = "s") -> list[int]:
    return [int(t) for t in (await store.get(session_id)).token_ids]


# -- one session's life ------------------------------------------------------------------------


async def test_a_conversation_of_two_turns(store: SessionStore) -> None:
    lease = await leased(store)
    assert lease.created
    assert lease.record.epoch == 0
    assert not lease.record.token_ids.size
    hello = [{"role": "user", "content": "héllo \ud83d 🦊"}]
    await store.begin_turn(lease, [1, 2, 3], keep_len=0, messages=hello, turn_json='{"t":1}')
    on_target = KvHandle("target 0:7070", lease.epoch, 4)
    await store.record(lease, round_of(4, 5, kv=on_target))
    record = await store.get("s")
    assert (record.in_use, record.num_turns, record.epoch) == (True, 1, lease.epoch)
    assert (record.model, record.turn_json) == (MODEL, '{"t":1}')
    assert record.messages == tuple(hello)
    assert (record.target_kv, record.draft_kv) == (on_target, None)
    assert 3590 < record.expires_in_s <= 3600
    on_draft = KvHandle("draft-0", lease.epoch, 3)
    await store.release(lease, target_kv=on_target, draft_kv=on_draft, messages=[*hello, *hello])

    again = await store.acquire("s", create=False, model=MODEL)
    assert not again.created
    assert again.epoch > lease.epoch
    assert not again.record.in_use
    assert again.record.draft_kv == on_draft
    assert len(again.record.messages) == 2
    assert again.record.token_ids.dtype == np.uint32
    await begin(store, again, [6, 7], keep_len=5)
    await store.record(again, round_of(8))
    record = await store.get("s")
    assert record.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert record.num_turns == 2
    assert record.counters == PER_ROUND + PER_ROUND
    await store.release(again, target_kv=None, draft_kv=None)
    assert (await store.get("s")).target_kv is None


@pytest.mark.parametrize("keep_len", [0, 1, 3, 5])
async def test_a_turn_may_cut_what_was_committed(store: SessionStore, keep_len: int) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2, 3, 4, 5])
    await store.release(lease, target_kv=None, draft_kv=None)
    lease = await leased(store)
    await begin(store, lease, [9, 9], keep_len=keep_len)
    await store.record(lease, round_of(10))
    assert await tokens_of(store) == [*[1, 2, 3, 4, 5][:keep_len], 9, 9, 10]


async def test_a_turn_cannot_keep_more_than_there_is(store: SessionStore) -> None:
    lease = await leased(store)
    with pytest.raises(InternalError, match="keep_len 1 of 0"):
        await begin(store, lease, [1], keep_len=1)


async def test_every_token_id_comes_back(store: SessionStore) -> None:
    """Bytes that mean something to protocols and strings (CR LF NUL, 0xff) are among them."""
    ids = np.array([0, 0x0A0D0A0D, 0x00FF00FF, 2**32 - 1, 2**31, 0x24242424], dtype=np.uint32)
    lease = await leased(store)
    await begin(store, lease, ids)
    many = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    await store.record(lease, RoundRecord(many, Counters(), None, None))
    assert np.array_equal((await store.get("s")).token_ids, np.concatenate([ids, many]))


@pytest.mark.parametrize("bad", [[-1], [2**32], np.array([-1]), np.array([2**32]), np.array([0.5])])
async def test_what_is_no_token_id_is_not_written(store: SessionStore, bad: Sequence[int]) -> None:
    lease = await leased(store)
    with pytest.raises((OverflowError, ValueError)):
        await store.record(lease, RoundRecord(bad, Counters(), None, None))
    assert await tokens_of(store) == []


async def test_deleting(store: SessionStore) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2])
    with pytest.raises(SessionInUse):
        await store.delete("s")
    handle = KvHandle("t", lease.epoch, 2)
    await store.release(lease, target_kv=handle, draft_kv=None)
    was = await store.delete("s")
    assert (was.target_kv, was.token_ids.tolist()) == (handle, [1, 2])
    for call in (store.get, store.delete):
        with pytest.raises(SessionNotFound):
            await call("s")


async def test_a_one_off_leaves_nothing(store: SessionStore, redis_url: str) -> None:
    lease = await leased(store)
    await begin(store, lease, [1])
    for _ in range(2):  # the second as if the first reply had been lost
        await store.release(lease, target_kv=None, draft_kv=None, delete=True)
    assert redis_command(redis_url, "DBSIZE") == b":0"


# -- leases and fencing ------------------------------------------------------------------------


async def test_who_may_acquire(store: SessionStore) -> None:
    with pytest.raises(SessionNotFound):
        await store.acquire("s", create=False, model=MODEL)
    lease = await leased(store)
    with pytest.raises(SessionInUse):
        await leased(store)
    with pytest.raises(InvalidRequest, match="session_id: made with model"):
        await store.acquire("s", create=True, model="other")
    await store.release(lease, target_kv=None, draft_kv=None)
    assert (await leased(store)).epoch > lease.epoch


async def test_one_of_many_acquires(redis_url: str, store: SessionStore) -> None:
    async with opened(redis_url) as other:
        results = await asyncio.gather(
            *(leased(s) for s in [store, other] * 20), return_exceptions=True
        )
        assert sum(isinstance(r, Lease) for r in results) == 1
        assert sum(isinstance(r, SessionInUse) for r in results) == 39


async def test_a_stale_writer_changes_nothing(redis_url: str) -> None:
    async with opened(redis_url, lease_ttl_s=0.05) as store:
        stale = await leased(store)
        await begin(store, stale, [1, 2])
        await asyncio.sleep(0.1)
        assert not (await store.get("s")).in_use
        lease = await leased(store)
        await begin(store, lease, [3], keep_len=2)
        before = await store.get("s")
        for write in (
            store.record(stale, round_of(9)),
            store.renew(stale),
            begin(store, stale, [9]),
            store.release(stale, target_kv=None, draft_kv=None),
            store.release(stale, target_kv=None, draft_kv=None, delete=True),
        ):
            with pytest.raises(LeaseLost):
                await write
        after = await store.get("s")
        assert after.epoch == before.epoch
        assert after.token_ids.tolist() == [1, 2, 3]


async def test_a_lease_lapses_unless_renewed_and_a_lapsed_one_nobody_took_is_good(
    redis_url: str,
) -> None:
    async with opened(redis_url, lease_ttl_s=0.4) as store:
        lease = await leased(store)
        for renewal in (
            store.renew(lease),
            store.record(lease, round_of(1)),
            begin(store, lease, []),
        ):
            await asyncio.sleep(0.25)
            await renewal
            assert (await store.get("s")).in_use
        await asyncio.sleep(0.5)
        assert not (await store.get("s")).in_use
        await store.record(lease, round_of(2))
        assert (await store.get("s")).in_use


async def test_nothing_is_written_after_release(store: SessionStore) -> None:
    lease = await leased(store)
    for _ in range(2):  # the second as if the first reply had been lost
        await store.release(lease, target_kv=None, draft_kv=None)
    with pytest.raises(LeaseLost):
        await store.record(lease, round_of(1))
    assert not (await store.get("s")).in_use


async def test_a_session_expires_whole(redis_url: str) -> None:
    async with opened(redis_url, session_ttl_s=0.5) as store:
        lease = await leased(store)
        for token in range(8):
            await store.record(lease, round_of(token))
            await asyncio.sleep(0.1)
        assert await tokens_of(store) == list(range(8))
        await asyncio.sleep(0.7)
        assert redis_command(redis_url, "DBSIZE") == b":0"
        with pytest.raises(SessionNotFound):
            await store.get("s")
        with pytest.raises(LeaseLost, match="expired"):
            await store.record(lease, round_of(9))


async def test_epochs_grow_across_deletion_and_loss_of_all_data(
    store: SessionStore, redis_url: str
) -> None:
    first = await leased(store)
    await store.release(first, target_kv=None, draft_kv=None, delete=True)
    second = await leased(store)
    assert redis_command(redis_url, "FLUSHALL") == b"+OK"
    third = await leased(store)
    assert first.epoch < second.epoch < third.epoch < 2**53
    assert third.created


async def test_a_session_half_evicted_is_none(store: SessionStore, redis_url: str) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2])
    assert redis_command(redis_url, "DEL", "outrider:session:{s}:tokens") == b":1"
    with pytest.raises(SessionNotFound):
        await store.get("s")
    with pytest.raises(InternalError, match="Redis has 0 tokens"):
        await store.record(lease, round_of(3))
    assert (await leased(store)).created


# -- repeats: as if a reply had been lost ------------------------------------------------------


def as_before(lease: Lease, committed_len: int, counters: Counters) -> None:
    """Makes the store believe that what it has written since is still unconfirmed."""
    lease.cursor.committed_len = committed_len
    lease.cursor.counters = counters


async def test_a_repeated_turn_is_one_turn(store: SessionStore) -> None:
    lease = await leased(store)
    for _ in range(2):
        as_before(lease, 0, Counters())
        await begin(store, lease, [1, 2, 3])
    record = await store.get("s")
    assert (record.token_ids.tolist(), record.num_turns) == ([1, 2, 3], 1)
    with pytest.raises(InternalError, match="Redis has 3 tokens"):
        await begin(store, lease, [4], keep_len=3)


async def test_a_repeated_record_is_one_record(store: SessionStore) -> None:
    lease = await leased(store)
    await begin(store, lease, [1])
    for _ in range(2):
        as_before(lease, 1, Counters())
        await store.record(lease, round_of(2, 3))
    as_before(lease, 1, Counters())
    await store.record(lease, round_of(2, 3).then(round_of(4)))
    record = await store.get("s")
    assert record.token_ids.tolist() == [1, 2, 3, 4]
    assert record.counters == PER_ROUND + PER_ROUND


@pytest.mark.parametrize("wrong_len", [0, 2, 4])
async def test_a_record_from_elsewhere_is_refused(store: SessionStore, wrong_len: int) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2, 3])
    as_before(lease, wrong_len, Counters())
    with pytest.raises(InternalError, match="Redis has 3 tokens"):
        await store.record(lease, round_of(8, 9))
    assert await tokens_of(store) == [1, 2, 3]


# -- many at once ------------------------------------------------------------------------------


async def test_200_sessions_at_once(store: SessionStore) -> None:
    async def converse(name: int) -> None:
        session_id = f"s{name}"
        lease = await leased(store, session_id)
        await begin(store, lease, [name])
        for i in range(20):
            await store.record(lease, round_of(name * 100 + i, i))
        await store.release(lease, target_kv=None, draft_kv=None)
        expected = [name] + [t for i in range(20) for t in (name * 100 + i, i)]
        assert await tokens_of(store, session_id) == expected

    async with asyncio.TaskGroup() as group:
        for name in range(200):
            group.create_task(converse(name))
    assert (await store.get("s199")).counters.num_draft_tokens == 80


async def test_records_of_one_lease_keep_their_order(store: SessionStore) -> None:
    lease = await leased(store)
    async with asyncio.TaskGroup() as group:
        for token in range(100):
            group.create_task(store.record(lease, round_of(token)))
    assert await tokens_of(store) == list(range(100))


async def test_a_cancelled_caller_disturbs_nobody(store: SessionStore) -> None:
    lease = await leased(store)
    await begin(store, lease, [1])
    tasks = [asyncio.create_task(store.get("s")) for _ in range(50)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, asyncio.CancelledError) for r in results[::2])
    assert all(r.token_ids.tolist() == [1] for r in results[1::2])  # type: ignore[union-attr]


async def test_a_cancelled_record_may_be_sent_again(store: SessionStore) -> None:
    lease = await leased(store)
    task = asyncio.create_task(store.record(lease, round_of(1, 2)))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    with pytest.raises(Unavailable, match="earlier round"):
        await store.record(lease, round_of(3))
    await store.record(lease, round_of(1, 2))
    await store.record(lease, round_of(3))
    assert await tokens_of(store) == [1, 2, 3]
    assert (await store.get("s")).counters == PER_ROUND + PER_ROUND


async def test_scripts_forgotten_are_sent_again(store: SessionStore, redis_url: str) -> None:
    lease = await leased(store)
    assert redis_command(redis_url, "SCRIPT", "FLUSH") == b"+OK"
    await begin(store, lease, [1])
    await store.record(lease, round_of(2))
    assert await tokens_of(store) == [1, 2]


async def test_close_writes_what_is_pending_and_then_refuses(redis_url: str) -> None:
    store = SessionStore(redis_url)
    await store.start()
    leases = [await leased(store, f"s{i}") for i in range(300)]
    tasks = [asyncio.create_task(store.record(lease, round_of(7))) for lease in leases]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*tasks)
    async with opened(redis_url) as other:
        assert await tokens_of(other, "s299") == [7]
    with pytest.raises(Unavailable, match="closed"):
        await store.get("s0")
    assert not await store.ping()


# -- Redis away --------------------------------------------------------------------------------


async def within(seconds: float, store: SessionStore) -> None:
    deadline = time.monotonic() + seconds
    while not await store.ping():
        assert time.monotonic() < deadline, "Redis is back, the store is not"
        await asyncio.sleep(0.02)


async def test_a_killed_server_is_noticed_at_once_and_so_is_its_return() -> None:
    with RedisServer() as server:
        async with opened(server.url) as store:
            lease = await leased(store)
            await begin(store, lease, [1])
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            start = time.monotonic()
            for _ in range(3):
                with pytest.raises(Unavailable, match="redis at unix:///"):
                    await store.record(lease, round_of(2))
            assert not await store.ping()
            assert time.monotonic() - start < 1
            server.stop()
            server.start()
            await within(3, store)
            with pytest.raises(LeaseLost, match="Redis has lost it"):
                await store.record(lease, round_of(2))
            assert (await leased(store)).epoch > lease.epoch


async def test_a_restart_between_calls_goes_unnoticed() -> None:
    with RedisServer() as server:
        async with opened(server.url) as store:
            first = await leased(store)
            server.stop()
            server.start()
            second = await leased(store)
            assert second.epoch > first.epoch


async def test_a_frozen_server_costs_a_timeout_and_loses_nothing() -> None:
    """What it had received is applied when it wakes: records sent again are not applied twice."""
    with RedisServer() as server:
        async with opened(server.url, socket_timeout_s=0.2) as store:
            leases = [await leased(store, f"s{i}") for i in range(20)]
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            start = time.monotonic()
            results = await asyncio.gather(
                *(store.record(lease, round_of(1, 2)) for lease in leases), return_exceptions=True
            )
            assert all(isinstance(r, Unavailable) for r in results)
            assert time.monotonic() - start < 2
            os.kill(server.pid, signal.SIGCONT)
            await within(5, store)
            for lease in leases:
                await store.record(lease, RoundRecord([1, 2, 3], PER_ROUND, None, None))
                record = await store.get(lease.session_id)
                assert record.token_ids.tolist() == [1, 2, 3]
                assert record.counters == PER_ROUND


async def test_a_turn_in_doubt_comes_before_its_rounds() -> None:
    with RedisServer() as server:
        async with opened(server.url, socket_timeout_s=0.2) as store:
            lease = await leased(store)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            with pytest.raises(Unavailable):
                await begin(store, lease, [1])
            os.kill(server.pid, signal.SIGCONT)
            await within(5, store)
            with pytest.raises(Unavailable, match="turn itself"):
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


async def test_no_server_at_start() -> None:
    store = SessionStore("redis://user:secret@127.0.0.1:1/0")
    with pytest.raises(Unavailable, match=r"redis://127\.0\.0\.1:1/0") as caught:
        await store.start()
    assert "secret" not in str(caught.value)


async def test_a_server_that_is_no_redis() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(64)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as web:
        port = web.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable):
            await SessionStore(f"redis://127.0.0.1:{port}").start()


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["", "a" * 129, "a b", "{a}", "a/b", "é", "a\n", "٣"])
async def test_bad_session_ids(bad: str, store: SessionStore) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await leased(store, bad)
    assert caught.value.field == "session_id"


def test_good_session_ids() -> None:
    for good in ("a", "A-z_0.9:x", "a" * 128):
        assert validate_session_id(good) == good


@pytest.mark.parametrize("url", ["http://a", "nonsense", "", "redis://h:port"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="redis URL"):
        SessionStore(url)


async def test_each_prefix_is_a_world(redis_url: str, store: SessionStore) -> None:
    async with opened(redis_url, prefix="elsewhere") as other:
        await leased(store)
        assert (await leased(other)).created
        assert redis_command(redis_url, "EXISTS", "elsewhere:session:{s}") == b":1"


@pytest.fixture
def cluster_url(tmp_path: Path) -> Iterator[str]:
    """A cluster of one, over TCP."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    path = tmp_path / "s"
    command = [str(find_server()), "--bind", "127.0.0.1", "--port", ports[0], "--save", ""]
    command += ["--cluster-enabled", "yes", "--cluster-port", ports[1], "--dir", str(tmp_path)]
    server = subprocess.Popen([*command, "--unixsocket", str(path)], stdout=subprocess.DEVNULL)
    try:
        while not answers(path):
            assert server.poll() is None
            time.sleep(0.01)
        slots = redis_command(f"unix://{path}", "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        assert slots == b"+OK"
        while b"cluster_state:ok" not in redis_command(f"unix://{path}", "CLUSTER", "INFO"):
            time.sleep(0.01)
        yield f"redis://127.0.0.1:{ports[0]}"
    finally:
        server.kill()
        server.wait()


async def test_scripts_touch_keys_of_one_slot_only(cluster_url: str) -> None:
    """A cluster refuses scripts whose keys are of several slots, or not declared."""
    async with opened(cluster_url) as store:
        lease = await leased(store)
        await begin(store, lease, [1])
        await store.record(lease, round_of(2))
        await store.renew(lease)
        await store.release(lease, target_kv=None, draft_kv=None)
        assert (await store.delete("s")).token_ids.tolist() == [1, 2]


async def test_a_defect_in_the_link_costs_one_batch(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises: those who wait are told, and the next call is served."""
    exchange, failures = Link.exchange, iter([RuntimeError("closed transport")])

    async def failing(link: Link, commands: Sequence[Command]) -> Sequence[Reply]:
        for failure in failures:
            raise failure
        return await exchange(link, commands)

    monkeypatch.setattr(Link, "exchange", failing)
    with pytest.raises(Unavailable, match="closed transport"):
        await leased(store)
    assert (await leased(store)).created
