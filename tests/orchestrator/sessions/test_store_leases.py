"""Leases, fencing and expiry of sessions in a real Redis; also in a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.sessions import Lease, SessionStore
from outrider.errors import (
    InvalidRequest,
    LeaseLost,
    SessionInUse,
    SessionNotFound,
    Unavailable,
)
from outrider.redis.embedded import answers, find_server
from tests.orchestrator.sessions.parts import MODEL, begin, leased, opened, round_of, tokens_of
from tests.redis_fixture import redis_command
from tests.stack import eventually


async def test_a_lease_is_exclusive_and_bound_to_the_model(store: SessionStore) -> None:
    with pytest.raises(SessionNotFound):
        await store.acquire("s", create=False, model=MODEL)
    lease = await leased(store)
    with pytest.raises(SessionInUse):
        await leased(store)
    with pytest.raises(InvalidRequest, match="session_id: made with model"):
        await store.acquire("s", create=True, model="other")
    await store.release(lease, target_kv=None, draft_kv=None)
    assert (await leased(store)).epoch > lease.epoch


async def test_one_of_many_concurrent_calls_acquires_the_lease(
    redis_url: str, store: SessionStore
) -> None:
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


def _leased_until_us(redis_url: str) -> int:
    """End of the lease by Redis' clock."""
    reply = redis_command(redis_url, "HGET", "outrider:session:{s}", "lease_until")
    return int(reply.split()[-1])


async def test_a_lease_expires_unless_renewed_and_an_expired_one_can_be_renewed(
    redis_url: str,
) -> None:
    async with opened(redis_url, lease_ttl_s=100) as store:
        lease = await leased(store)
        for renew in (
            lambda: store.renew(lease),
            lambda: store.record(lease, round_of(1)),
            lambda: begin(store, lease, []),
        ):
            until_us = _leased_until_us(redis_url)
            await asyncio.sleep(0.05)
            await renew()
            assert _leased_until_us(redis_url) >= until_us + 50_000
            assert (await store.get("s")).in_use
        async with opened(redis_url, lease_ttl_s=0.05) as hasty:
            await hasty.renew(lease)
            await asyncio.sleep(0.1)
            assert not (await store.get("s")).in_use
        await store.record(lease, round_of(2))
        assert (await store.get("s")).in_use


async def test_nothing_is_written_after_release(store: SessionStore) -> None:
    lease = await leased(store)
    for _ in range(2):  # the second, as after a lost reply
        await store.release(lease, target_kv=None, draft_kv=None)
    with pytest.raises(LeaseLost):
        await store.record(lease, round_of(1))
    assert not (await store.get("s")).in_use


async def test_both_keys_of_a_session_expire_together(redis_url: str) -> None:
    """session_ttl_s after the last write."""
    keys = ("outrider:session:{s}", "outrider:session:{s}:tokens")

    def left_ms() -> list[int]:
        return [int(redis_command(redis_url, "PTTL", key)[1:]) for key in keys]

    async def is_empty() -> bool:
        """Redis removes expired keys from time to time."""
        return redis_command(redis_url, "DBSIZE") == b":0"

    async with opened(redis_url, session_ttl_s=1000) as store:
        lease = await leased(store)
        await store.record(lease, round_of(0))
        for token in range(1, 5):
            for key in keys:  # as if time had passed
                assert redis_command(redis_url, "PEXPIRE", key, "500000") == b":1"
            await store.record(lease, round_of(token))
            assert all(500_000 < left <= 1_000_000 for left in left_ms())
        assert await tokens_of(store) == list(range(5))
        async with opened(redis_url, session_ttl_s=0.1, lease_ttl_s=0.1) as hasty:
            await hasty.renew(lease)
            await eventually(is_empty)
        with pytest.raises(SessionNotFound):
            await store.get("s")
        with pytest.raises(LeaseLost, match="expired"):
            await store.record(lease, round_of(9))


async def test_each_write_extends_the_clients_set_of_sessions(
    store: SessionStore, redis_url: str
) -> None:
    """It outlives the session; otherwise the client could exceed its session limit."""
    count, session = "outrider:key:{ada}:sessions", "outrider:session:{ada/s}"

    def outlives() -> bool:
        left = [int(redis_command(redis_url, "PTTL", key)[1:]) for key in (count, session)]
        assert redis_command(redis_url, "PEXPIRE", count, "1000000") == b":1"
        return left[0] > left[1] > 1_000_000

    assert redis_command(redis_url, "ZADD", count, "1", "other") == b":1"
    lease = await store.acquire("s", create=True, model=MODEL, client="ada")
    assert outlives()
    await store.begin_turn(lease, [1, 2], keep_len=0, messages=(), turn_json="{}")
    assert outlives()
    await store.record(lease, round_of(3))
    assert outlives()
    await store.renew(lease)
    assert outlives()
    await store.release(lease, target_kv=None, draft_kv=None)
    assert outlives()
    assert redis_command(redis_url, "ZSCORE", count, session) == b"$-1", (
        "its creator has counted it"
    )
    lease = await store.acquire("s", create=False, model=MODEL, client="ada")
    assert redis_command(redis_url, "ZCARD", count) == b":2"


async def test_a_session_does_not_expire_while_it_is_leased(redis_url: str) -> None:
    """Leases are renewed every few seconds; session_ttl_s may be shorter."""
    async with opened(redis_url, session_ttl_s=0.001) as store:
        lease = await leased(store)
        await store.record(lease, round_of(1))
        await store.renew(lease)
        for key in ("outrider:session:{s}", "outrider:session:{s}:tokens"):
            assert int(redis_command(redis_url, "PTTL", key)[1:]) > 1_000
        await store.release(lease, target_kv=None, draft_kv=None)

        async def is_gone() -> bool:
            with contextlib.suppress(SessionNotFound):
                return not await store.get("s")
            return True

        await eventually(is_gone)


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


async def test_a_session_with_one_evicted_key_does_not_exist(
    store: SessionStore, redis_url: str
) -> None:
    lease = await leased(store)
    await begin(store, lease, [1, 2])
    assert redis_command(redis_url, "DEL", "outrider:session:{s}:tokens") == b":1"
    with pytest.raises(SessionNotFound):
        await store.get("s")
    with pytest.raises(LeaseLost, match="lost by Redis"):
        await store.record(lease, round_of(3))
    assert (await leased(store)).created


def _start_cluster(directory: Path, path: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """The port, and the process; it ends at once if one of its ports is in use."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(str(probe.getsockname()[1]))
    command = [str(find_server()), "--bind", "127.0.0.1", "--port", ports[0], "--save", ""]
    command += ["--cluster-enabled", "yes", "--cluster-port", ports[1], "--dir", str(directory)]
    command += ["--unixsocket", str(path)]
    return ports[0], subprocess.Popen(command, stdout=subprocess.DEVNULL)


@pytest.fixture
def cluster_url(tmp_path: Path) -> Iterator[str]:
    """A cluster of one node, over TCP."""
    path = tmp_path / "s"
    for _ in range(10):  # another process may take a free port first
        port, server = _start_cluster(tmp_path, path)
        while server.poll() is None and not answers(path):
            time.sleep(0.01)
        if server.poll() is None:
            break
    try:
        assert server.poll() is None
        slots = redis_command(f"unix://{path}", "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        assert slots == b"+OK"
        while b"cluster_state:ok" not in redis_command(f"unix://{path}", "CLUSTER", "INFO"):
            time.sleep(0.01)
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
async def test_scripts_touch_keys_of_one_slot_only(cluster_url: str) -> None:
    """A cluster refuses scripts whose keys are of several slots, or not declared."""
    async with opened(cluster_url) as store:
        lease = await leased(store)
        await begin(store, lease, [1])
        await store.record(lease, round_of(2))
        await store.renew(lease)
        await store.release(lease, target_kv=None, draft_kv=None)
        assert await tokens_of(store) == [1, 2]
        await store.delete("s")


async def test_an_orphan_begins_its_turn_after_a_later_lease_without_a_turn(
    store: SessionStore,
) -> None:
    """Its holder ran while Redis was away; the later holder found no turn to resume."""
    first = await leased(store)
    second = await store.acquire("s", create=False, model=MODEL, takeover=True)
    for act in (begin(store, first, [1, 2]), store.renew(first)):
        with pytest.raises(Unavailable, match="leased to a later request"):
            await act
    await store.release(second, target_kv=None, draft_kv=None)
    with pytest.raises(Unavailable):
        await store.renew(first)  # an orphan does not regain the lease
    assert (await store.get("s")).has_lost_turn
    for _ in range(2):  # the second, as after a lost reply
        await _begun_again(store, first, [1, 2])
    await store.record(first, round_of(3))
    await store.renew(first)
    record = await store.get("s")
    assert (record.token_ids.tolist(), record.num_turns) == ([1, 2, 3], 1)
    assert record.in_use
    assert not record.has_lost_turn
    assert record.turn_epoch == record.epoch > first.epoch, "it can be resumed"
    third = await store.acquire("s", create=False, model=MODEL, takeover=True)
    for act in (store.record(first, round_of(9)), store.renew(first)):
        with pytest.raises(LeaseLost):
            await act
    await store.record(third, round_of(4))
    assert await tokens_of(store) == [1, 2, 3, 4]


async def _begun_again(store: SessionStore, lease: Lease, token_ids: list[int]) -> None:
    lease.cursor.committed_len = 0
    await begin(store, lease, token_ids)


async def test_a_later_turn_is_never_overwritten(store: SessionStore) -> None:
    """Whether or not it has begun."""
    for has_begun in (False, True):
        first = await leased(store)
        empty = await store.acquire("s", create=False, model=MODEL, takeover=True)
        await store.release(empty, target_kv=None, draft_kv=None)
        second = await leased(store)
        if has_begun:
            await begin(store, second, [5])
        again = await store.acquire("s", create=False, model=MODEL, takeover=True)
        await store.release(again, target_kv=None, draft_kv=None)
        with pytest.raises(LeaseLost):
            await begin(store, first, [1])
        if not has_begun:
            await begin(store, second, [5])
            await store.record(second, round_of(6))
            await store.release(second, target_kv=None, draft_kv=None)
            assert await tokens_of(store) == [5, 6]
            await store.delete("s")
    assert await tokens_of(store) == [5]


async def test_a_holder_that_has_released_cannot_begin_a_turn(store: SessionStore) -> None:
    first = await leased(store)
    await begin(store, first, [1])
    await store.release(first, target_kv=None, draft_kv=None)
    given_up = await leased(store)
    await store.release(given_up, target_kv=None, draft_kv=None)
    empty = await store.acquire("s", create=False, model=MODEL, takeover=True)
    await store.release(empty, target_kv=None, draft_kv=None)
    with pytest.raises(LeaseLost):
        await begin(store, given_up, [9], keep_len=1)
    assert await tokens_of(store) == [1]
    assert not (await store.get("s")).has_lost_turn


@pytest.mark.slow
async def test_turns_begin_in_the_order_of_leases(redis_url: str, store: SessionStore) -> None:
    """Whatever holders do: each turn is begun by one of them, and none is changed later."""
    num_begun = num_late = 0
    for seed in range(40):
        assert redis_command(redis_url, "FLUSHALL") == b"+OK"
        holders = Holders(store, random.Random(seed))
        for _ in range(150):
            await holders.act()
            assert await tokens_of(store) == holders.tokens
        num_begun += len(holders.begun)
        num_late += holders.num_late
    assert num_begun > 80
    assert num_late > 5, "some began after a later lease"


class Holders:
    """Holders of one session that act in random order, and the expected tokens."""

    def __init__(self, store: SessionStore, generator: random.Random) -> None:
        self._store = store
        self._generator = generator
        self._leases: list[Lease] = []
        # Indices of leases: those that began a turn, in order, and those that have any.
        self.begun: list[int] = []
        self._with_turn: set[int] = set()
        self.tokens: list[int] = []
        self.num_late = 0

    async def act(self) -> None:
        with contextlib.suppress(LeaseLost, SessionInUse, Unavailable):
            if not self._leases or self._generator.random() < 0.15:
                await self._acquire()
                return
            num = len(self._leases)
            number = self._generator.randrange(max(0, num - 4), num)
            await self._act(number, self._leases[number])

    async def _acquire(self) -> None:
        takeover = bool(self._leases) and self._generator.random() < 0.6
        made = await self._store.acquire("s", create=True, model=MODEL, takeover=takeover)
        self._leases.append(made)
        if takeover and self.begun and made.record.turn_epoch == made.record.epoch:
            self._with_turn.add(len(self._leases) - 1)  # it resumes the last turn

    async def _act(self, number: int, lease: Lease) -> None:
        acts = ["begin", "begin", "record", "release", "release", "renew"]
        act, token = self._generator.choice(acts), len(self.tokens)
        if act == "begin" and number not in self._with_turn:
            if lease.cursor.committed_len == len(self.tokens):
                await begin(self._store, lease, [token], keep_len=len(self.tokens))
                assert all(number > other for other in self.begun), (number, self.begun)
                self.num_late += number < len(self._leases) - 1
                self.begun.append(number)
                self._with_turn.add(number)
                self.tokens.append(token)
        elif act == "record" and number in self._with_turn:
            await self._store.record(lease, round_of(token))
            assert number >= self.begun[-1]
            self.tokens.append(token)
        elif act == "release":
            await self._store.release(lease, target_kv=None, draft_kv=None)
        elif act == "renew":
            await self._store.renew(lease)
