"""Registry with a real Redis: replicas announce themselves, watchers follow, either may fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from outrider.errors import ConfigError
from outrider.redis.connection import RedisConnection
from outrider.redis.embedded import RedisServer
from outrider.redis.registry import Announcer, Replica, ReplicaState, Watcher
from tests import redis_fixture
from tests.redis_fixture import redis_command

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url

ROOT = Path(__file__).parents[2]
INDEX = b"outrider:replicas:target"
BAD = b"outrider:replica:target:bad"
# Far more than needed: the machine may be busy.
TIMEOUT_S = 60.0

REPLICA = Replica(
    tier="target",
    id="a1",
    address="10.0.0.1:50052",
    state=ReplicaState.READY,
    model_fingerprint="f" * 64,
    tokenizer_fingerprint="e" * 64,
    vocab_size=256,
    kv_capacity_tokens=4096,
    kv_used_tokens=48,
    num_open_generations=3,
)


@contextlib.asynccontextmanager
async def in_background(run: Callable[[], Any]) -> AsyncIterator[None]:
    """Runs the task for the time of a block."""
    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Watched:
    """A watcher and all the lists it has reported."""

    def __init__(self, url: str, tier: str = "target") -> None:
        self.lists: list[list[Replica]] = []
        self._reported = asyncio.Event()
        self.watcher = Watcher(url, tier, self._on_change)

    def _on_change(self, replicas: list[Replica]) -> None:
        self.lists.append(replicas)
        self._reported.set()

    @property
    def now(self) -> list[Replica] | None:
        return self.lists[-1] if self.lists else None

    async def sees(self, *replicas: Replica) -> None:
        """Returns when exactly these replicas are listed."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.now != list(replicas):
                self._reported.clear()
                await self._reported.wait()


@contextlib.asynccontextmanager
async def watching(url: str, tier: str = "target") -> AsyncIterator[Watched]:
    watched = Watched(url, tier)
    async with in_background(watched.watcher.run):
        yield watched


@contextlib.asynccontextmanager
async def announcing(
    url: str, replica: Replica = REPLICA
) -> AsyncIterator[tuple[Announcer, list[Replica]]]:
    """The announcer, and a list whose only item is the record it announces."""
    current = [replica]
    announcer = Announcer(url, lambda: current[0])
    async with in_background(announcer.run):
        yield announcer, current


async def write(url: str, *commands: tuple[bytes, ...]) -> None:
    link = RedisConnection(url, timeout_s=TIMEOUT_S, preamble=())
    replies = await link.exchange(commands)
    await link.close()
    assert not any(isinstance(reply, Exception) for reply in replies), replies


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 (Redis and logs send no event)
            await asyncio.sleep(0.02)


async def test_a_replica_is_announced_and_leaves_no_keys(redis_url: str) -> None:
    async with watching(redis_url) as watched:
        await watched.sees()
        async with announcing(redis_url):
            await watched.sees(REPLICA)
        await watched.sees()
        assert redis_command(redis_url, "DBSIZE") == b":0"
    assert watched.lists == [[], [REPLICA], []], "each change is reported once"


async def test_state_changes_are_announced_at_once_and_load_soon(redis_url: str) -> None:
    async with watching(redis_url) as watched, announcing(redis_url) as (announcer, current):
        await watched.sees(REPLICA)
        for state in (ReplicaState.STUCK, ReplicaState.READY, ReplicaState.DRAINING):
            current[0] = replace(REPLICA, state=state)
            announcer.renew()
            await watched.sees(current[0])
        current[0] = replace(REPLICA, num_open_generations=7)
        await watched.sees(current[0])


async def test_several_replicas_and_separate_tiers(redis_url: str) -> None:
    second = replace(REPLICA, id="b2", address="10.0.0.2:50052")
    draft = replace(REPLICA, tier="draft", id="a1")
    async with (
        watching(redis_url) as targets,
        watching(redis_url, "draft") as drafts,
        announcing(redis_url, second),
        announcing(redis_url, draft),
    ):
        async with announcing(redis_url):
            await targets.sees(REPLICA, second)
            await drafts.sees(draft)
        await targets.sees(second)
        await drafts.sees(draft)


ANNOUNCE = """
import asyncio, sys
from outrider.redis.registry import Announcer, Replica
replica = Replica.from_json(sys.argv[2].encode())
announcer = Announcer(sys.argv[1], lambda: replica)
asyncio.run(announcer.run())
"""


@contextlib.asynccontextmanager
async def announcing_process(url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that announces the replica; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ANNOUNCE, url, REPLICA.to_json().decode(), cwd=ROOT
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_record_that_is_not_renewed_expires(redis_url: str, number: signal.Signals) -> None:
    """The process is killed or frozen. The record is removed from the index, too."""
    other = replace(REPLICA, id="b2")
    async with (
        announcing_process(redis_url) as process,
        watching(redis_url) as watched,
        announcing(redis_url, other),
    ):
        await watched.sees(REPLICA, other)
        process.send_signal(number)
        await watched.sees(other)
        await until(lambda: redis_command(redis_url, "ZCARD", INDEX.decode()) == b":1")


@pytest.mark.slow
async def test_records_and_index_expire_without_a_watcher(redis_url: str) -> None:
    async with announcing_process(redis_url):
        await until(lambda: redis_command(redis_url, "DBSIZE") == b":2")
    await until(lambda: redis_command(redis_url, "DBSIZE") == b":0")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["restarted", "frozen"])
async def test_redis_is_lost_and_comes_back(way: str) -> None:
    """The last list stays valid. Both sides log it once and recover on their own."""

    def num_logged(event: str, logs: list[Any]) -> int:
        return sum(entry["event"] == event for entry in logs)

    with RedisServer() as server, capture_logs() as logs:
        async with watching(server.url) as watched, announcing(server.url) as (announcer, _):
            await watched.sees(REPLICA)
            pid = server.pid
            assert pid is not None
            if way == "restarted":
                server.stop()
            else:
                os.kill(pid, signal.SIGSTOP)
            await until(lambda: num_logged("registry_away", logs) >= 2)
            announcer.renew()
            await asyncio.sleep(1.5)  # more attempts, of both
            assert watched.lists == [[REPLICA]] or watched.lists == [[], [REPLICA]]
            assert num_logged("registry_away", logs) == 2
            if way == "restarted":
                server.start()
            else:
                os.kill(pid, signal.SIGCONT)
            await until(lambda: num_logged("registry_back", logs) >= 2)
            await watched.sees(REPLICA)
        assert redis_command(server.url, "DBSIZE") == b":0"


@pytest.mark.slow
async def test_stopping_without_redis_is_fast() -> None:
    with RedisServer() as server:
        async with watching(server.url) as watched, announcing(server.url):
            await watched.sees(REPLICA)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            async with asyncio.timeout(TIMEOUT_S):  # the blocks end
                await asyncio.sleep(0)


def record(**fields: Any) -> bytes:
    return json.dumps({**json.loads(REPLICA.to_json()), **fields}).encode()


MALFORMED = {
    "no JSON": b"\xff\x00{",
    "nothing": b"",
    "a list": b"[]",
    "nested deeply": b"[" * 7_000,
    "without fields": b"{}",
    "an unknown state": record(state="sleepy"),
    "a state that is none": record(state=[1]),
    "another's name": record(id="a1"),
    "another tier": record(id="bad", tier="draft"),
    "no port": record(id="bad", address="10.0.0.1"),
    "a negative count": record(id="bad", num_open_generations=-1),
    "a count that is none": record(id="bad", vocab_size=True),
    "a huge number": record(id="bad", kv_used_tokens=1 << 70),
    "a huge text": record(id="bad", model_fingerprint="x" * 100_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MALFORMED)
async def test_malformed_records_are_skipped(kind: str, redis_url: str) -> None:
    """Logged once, however often they are read. Other records are seen."""
    with capture_logs() as logs:
        async with announcing(redis_url), watching(redis_url) as watched:
            await write(
                redis_url,
                (b"SET", BAD, MALFORMED[kind]),
                (b"ZADD", INDEX, b"0", b"bad"),
            )
            await watched.sees(REPLICA)
            good = record(id="bad", unknown="field")
            await until(lambda: "replica_record_malformed" in [entry["event"] for entry in logs])
            await asyncio.sleep(0.7)  # read again meanwhile
            # Added to the index again, which expires if nothing is announced for a while.
            await write(redis_url, (b"SET", BAD, good), (b"ZADD", INDEX, b"0", b"bad"))
            await watched.sees(REPLICA, replace(REPLICA, id="bad"))
    assert [e["event"] for e in logs].count("replica_record_malformed") == 1


async def test_keys_of_another_type_are_harmless(redis_url: str) -> None:
    """A record of type list is ignored. An index of type string counts as Redis unavailable."""
    with capture_logs() as logs:
        async with watching(redis_url) as watched:
            await write(redis_url, (b"RPUSH", BAD, b"x"), (b"ZADD", INDEX, b"0", b"bad"))
            async with announcing(redis_url):
                await watched.sees(REPLICA)
                await write(redis_url, (b"DEL", INDEX), (b"SET", INDEX, b"x"))
                await until(lambda: any(e["event"] == "registry_away" for e in logs))
                assert watched.now == [REPLICA]
                await write(redis_url, (b"DEL", INDEX))
                await until(lambda: any(e["event"] == "registry_back" for e in logs))
                await watched.sees(REPLICA)


def test_an_invalid_url_is_an_error() -> None:
    with pytest.raises(ConfigError):
        Announcer("http://x", lambda: REPLICA)
    with pytest.raises(ConfigError):
        Watcher("x", "target", lambda _: None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
FIELDS = st.sampled_from(sorted(REPLICA.__dataclass_fields__))


@given(st.dictionaries(FIELDS, JSON))
def test_a_record_is_parsed_or_rejected(fields: dict[str, Any]) -> None:
    """For any content: a replica that round-trips, or ValueError."""
    with contextlib.suppress(ValueError):
        replica = Replica.from_json(record(**fields))
        assert Replica.from_json(replica.to_json()) == replica
