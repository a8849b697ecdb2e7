"""Sessions in a real Redis: turns, repeated writes, concurrency, session ids, lists."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from structlog.testing import capture_logs

from orchestrator.sessions import (
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
    SessionInUse,
    SessionNotFound,
    Unavailable,
)
from tests.orchestrator.sessions.parts import (
    MODEL,
    PATIENT,
    PER_ROUND,
    begin,
    leased,
    opened,
    round_of,
    tokens_of,
)
from tests.redis_fixture import redis_command

# -- turns of one session ----------------------------------------------------------------------


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
    assert 3000 < record.expires_in_s <= 3600
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
async def test_a_turn_may_drop_committed_tokens(store: SessionStore, keep_len: int) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2, 3, 4, 5])
    await store.release(lease, target_kv=None, draft_kv=None)
    lease = await leased(store)
    await begin(store, lease, [9, 9], keep_len=keep_len)
    await store.record(lease, round_of(10))
    assert await tokens_of(store) == [*[1, 2, 3, 4, 5][:keep_len], 9, 9, 10]


async def test_a_turn_cannot_keep_more_tokens_than_are_committed(store: SessionStore) -> None:
    lease = await leased(store)
    with pytest.raises(InternalError, match="keep_len 1 of 0"):
        await begin(store, lease, [1], keep_len=1)


async def test_every_token_id_is_stored_and_read_back(store: SessionStore) -> None:
    """Also ids with bytes that are special in protocols and strings: CR, LF, NUL, 0xff."""
    ids = np.array([0, 0x0A0D0A0D, 0x00FF00FF, 2**32 - 1, 2**31, 0x24242424], dtype=np.uint32)
    lease = await leased(store)
    await begin(store, lease, ids)
    many = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    await store.record(lease, RoundRecord(many, Counters(), None, None))
    assert np.array_equal((await store.get("s")).token_ids, np.concatenate([ids, many]))


@pytest.mark.parametrize("bad", [[-1], [2**32], np.array([-1]), np.array([2**32]), np.array([0.5])])
async def test_an_invalid_token_id_is_not_written(store: SessionStore, bad: Sequence[int]) -> None:
    lease = await leased(store)
    with pytest.raises((OverflowError, ValueError)):
        await store.record(lease, RoundRecord(bad, Counters(), None, None))
    assert await tokens_of(store) == []


async def test_a_session_is_deleted_unless_it_is_in_use(store: SessionStore) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2])
    with pytest.raises(SessionInUse):
        await store.delete("s")
    await store.release(lease, target_kv=KvHandle("t", lease.epoch, 2), draft_kv=None)
    await store.delete("s")
    for call in (store.get, store.delete):
        with pytest.raises(SessionNotFound):
            await call("s")


async def test_a_one_off_session_leaves_nothing_in_redis(
    store: SessionStore, redis_url: str
) -> None:
    lease = await leased(store)
    await begin(store, lease, [1])
    for _ in range(2):  # the second, as after a lost reply
        await store.release(lease, target_kv=None, draft_kv=None, delete=True)
    assert redis_command(redis_url, "DBSIZE") == b":0"


# -- repeated writes, as after a lost reply ----------------------------------------------------


def as_before(lease: Lease, committed_len: int, counters: Counters) -> None:
    """Resets the cursor, as if later writes were unconfirmed."""
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
async def test_a_record_with_another_offset_is_refused(store: SessionStore, wrong_len: int) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2, 3])
    as_before(lease, wrong_len, Counters())
    with pytest.raises(InternalError, match="Redis has 3 tokens"):
        await store.record(lease, round_of(8, 9))
    assert await tokens_of(store) == [1, 2, 3]


# -- concurrency -------------------------------------------------------------------------------


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


async def test_cancelled_reads_do_not_disturb_others(store: SessionStore) -> None:
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


async def test_scripts_that_redis_has_lost_are_sent_again(
    store: SessionStore, redis_url: str
) -> None:
    lease = await leased(store)
    assert redis_command(redis_url, "SCRIPT", "FLUSH") == b"+OK"
    await begin(store, lease, [1])
    await store.record(lease, round_of(2))
    assert await tokens_of(store) == [1, 2]


async def test_close_sends_pending_writes_and_refuses_new_ones(redis_url: str) -> None:
    store = SessionStore(redis_url, StoreOptions(**PATIENT))
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


# -- session ids and prefixes ------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["", "a" * 129, "a b", "{a}", "a/b", "é", "a\n", "٣"])
async def test_invalid_session_ids_are_refused(bad: str, store: SessionStore) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await leased(store, bad)
    assert caught.value.field == "session_id"


def test_valid_session_ids() -> None:
    for good in ("a", "A-z_0.9:x", "a" * 128):
        assert validate_session_id(good) == good


@pytest.mark.parametrize("url", ["http://a", "nonsense", "", "redis://h:port"])
def test_an_invalid_redis_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="redis URL"):
        SessionStore(url)


async def test_sessions_of_different_prefixes_are_separate(
    redis_url: str, store: SessionStore
) -> None:
    async with opened(redis_url, prefix="elsewhere") as other:
        await leased(store)
        assert (await leased(other)).created
        assert redis_command(redis_url, "EXISTS", "elsewhere:session:{s}") == b":1"


# -- lists of sessions -------------------------------------------------------------------------


async def listed(store: SessionStore, client: str = "") -> dict[str, tuple[int, int, bool]]:
    """Tokens, turns and `in_use` of all sessions of the client, from all pages."""
    found: dict[str, tuple[int, int, bool]] = {}
    cursor = 0
    while True:
        page = await store.page(cursor, client)
        cursor = page.cursor
        for one in page.sessions:
            assert 0 < one.expires_in_s <= StoreOptions().session_ttl_s
            found[one.session_id] = (one.num_tokens, one.num_turns, one.in_use)
        if not cursor:
            return found


async def test_a_client_lists_only_its_own_sessions(redis_url: str) -> None:
    async with opened(redis_url, prefix="listed") as store:
        for client, num in (("", 3), ("ada", 1200), ("ada.b", 2)):
            for number in range(num):
                lease = await store.acquire(f"s{number}", create=True, model=MODEL, client=client)
                if number == 1:
                    await begin(store, lease, [1, 2, 3])
                if number:
                    await store.release(lease, target_kv=None, draft_kv=None)
        three = {"s0": (0, 0, True), "s1": (3, 1, False), "s2": (0, 0, False)}
        assert await listed(store) == three
        assert await listed(store, "ada.b") == {name: three[name] for name in ("s0", "s1")}
        many = await listed(store, "ada")
        assert many == three | {f"s{number}": (0, 0, False) for number in range(3, 1200)}
        assert await listed(store, "nobody") == {}


@pytest.mark.parametrize(
    "foreign",
    [
        ("SET", "{key}", "a-string"),
        ("RPUSH", "{key}", "a-list"),
        ("HSET", "{key}", "num_tokens", "many"),
        ("HSET", "{key}", "num_tokens", "-1"),
        ("HSET", "{key}", "num_tokens", "1", "lease_until", "soon"),
        ("HSET", "{key}", "num_tokens", "1", "num_turns", "4294967296"),
        ("SET", "listed:session:{a*name}", "x"),
        ("SET", r'"listed:session:{\xff}"', "x"),
    ],
)
async def test_a_list_leaves_out_an_unreadable_session(
    foreign: tuple[str, ...], redis_url: str
) -> None:
    """It counts and logs it, and has the other sessions."""
    key = "listed:session:{foreign}"
    async with opened(redis_url, prefix="listed") as store:
        for name in ("a", "z"):
            lease = await store.acquire(name, create=True, model=MODEL)
            await begin(store, lease, [1, 2, 3])
        redis_command(redis_url, *(word.replace("{key}", key) for word in foreign))
        with capture_logs() as logs:
            page = await store.page(0)
    assert {one.session_id: one.num_tokens for one in page.sessions} == {"a": 3, "z": 3}
    assert page.num_unreadable == 1
    (entry,) = [log for log in logs if log["event"] == "unreadable_sessions"]
    assert entry["count"] == 1
