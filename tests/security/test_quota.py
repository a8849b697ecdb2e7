"""Quotas of API keys: the token bucket, the count over all orchestrators, session limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from structlog.testing import capture_logs

import orchestrator.admission.shared_quota
from orchestrator.admission.quota import Quota
from orchestrator.admission.shared_quota import SharedQuotas
from outrider.cli.relay import Relay
from outrider.client.channel import Access
from outrider.errors import CapacityExceeded
from outrider.redis.embedded import RedisServer
from outrider.security.keys import KeyLimits
from outrider.v1 import orchestrator_pb2
from tests.redis_fixture import redis_command
from tests.security.parts import (
    GREEDY,
    client,
    generated,
    orchestrated,
    tiers,
    write_keys,
)
from tests.services.parts import Refusal, refusal
from tests.stack import eventually, request

Code = grpc.StatusCode


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_tokens_flow_back_by_the_clock() -> None:
    """One minute's worth is available at once; after more, the wait is exact to a token."""
    clock = Clock()
    quota = Quota("ada", KeyLimits(tokens_per_minute=600), clock)
    for _ in range(2):
        with quota.stream():
            quota.spend(300)
    with pytest.raises(CapacityExceeded) as caught, quota.stream():
        raise AssertionError("it is accepted")
    assert caught.value.retry_after_s == pytest.approx(0.1)
    clock.now_s += 0.05
    with pytest.raises(CapacityExceeded), quota.stream():
        raise AssertionError("it is accepted")
    clock.now_s += 0.06
    with quota.stream():
        quota.spend(1_200)
    with pytest.raises(CapacityExceeded) as caught, quota.stream():
        raise AssertionError("it is accepted")
    hint_s = caught.value.retry_after_s
    assert 115 < hint_s < 125
    clock.now_s += hint_s
    with quota.stream():
        pass
    clock.now_s += 3_600
    quota.spend(599)
    with quota.stream():
        quota.spend(1)
    with pytest.raises(CapacityExceeded), quota.stream():
        raise AssertionError("an hour of rest holds no more than a minute's worth")


def test_without_limits_nothing_is_refused() -> None:
    quota = Quota("", KeyLimits())
    with contextlib.ExitStack() as stack:
        for _ in range(1_000):
            stack.enter_context(quota.stream())
            quota.spend(10**9)
    assert quota.num_streams == 0
    assert quota.num_spent == 0, "there is nothing to report"


@contextlib.asynccontextmanager
async def two(folder: Path, redis_url: str, limits: KeyLimits) -> AsyncIterator[tuple[Any, Any]]:
    """Clients with ada's key of two orchestrators that share tiers and keys."""
    keys = write_keys(folder / "keys", ada=limits)
    file = str(folder / "keys")
    async with (
        tiers() as servers,
        orchestrated(servers, redis_url, api_keys_file=file) as first,
        orchestrated(servers, redis_url, api_keys_file=file) as second,
    ):
        access = Access(api_key=keys["ada"])
        async with client(first.endpoint, access) as here, client(second.endpoint, access) as there:
            yield here, there


async def test_streams_count_at_all_orchestrators(tmp_path: Path, redis_url: str) -> None:
    """A stream at the first leaves none at the second until it ends."""
    async with two(tmp_path, redis_url, KeyLimits(streams=1)) as (here, there):
        asked = request([1, 2], {**GREEDY, "max_tokens": 20_000})
        stream = here.Generate(asked, timeout=150)
        await stream.read()
        refused = await refusal(generated(there))
        assert (refused.code, bool(refused.retry_after_s)) == (Code.RESOURCE_EXHAUSTED, True)
        stream.cancel()

        async def is_accepted() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return bool(await generated(there))
            return False

        await eventually(is_accepted)
        for _ in range(3):  # an end is known at once where it was
            await generated(there)


async def test_tokens_count_at_all_orchestrators(tmp_path: Path, redis_url: str) -> None:
    """Tokens spent at the first are charged at the second after the next report."""
    limits = KeyLimits(tokens_per_minute=60)
    async with two(tmp_path, redis_url, limits) as (here, there):
        await generated(here, num_tokens=400)

        async def is_refused() -> bool:
            """Refused for the 400 tokens spent at the first; its own alone cause a shorter hint."""
            try:
                await generated(there, num_tokens=1)
            except grpc.aio.AioRpcError as error:
                refused = Refusal(error.code(), "", rpc_status.from_call(error))
                assert refused.code is Code.RESOURCE_EXHAUSTED
                return (refused.retry_after_s or 0.0) > 100
            return False

        await eventually(is_refused)


def _hash(redis_url: str) -> dict[str, float]:
    """Hash of ada's tokens: `spent`, `at`, and the total of each orchestrator."""
    reply = redis_command(redis_url, "HGETALL", "outrider:key:{ada}:tokens")
    words = [line.decode() for line in reply.split(b"\r\n")[2::2]]
    return {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.slow
async def test_tokens_count_once_though_redis_answers_late(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report whose reply is late is sent again, and both arrive."""
    monkeypatch.setattr(orchestrator.admission.shared_quota, "REDIS_TIMEOUT_S", 0.5)
    socket = redis_url.removeprefix("unix://")
    async with Relay("127.0.0.1", 0, socket, 0, 0.0) as relay:
        shared = SharedQuotas(f"redis://{relay.address}/0")
        quota = Quota("ada", KeyLimits(tokens_per_minute=1))  # hardly any flow back during the test
        async with shared.running(), shared.stream(quota):
            quota.spend(100)
            await eventually(lambda: _spent(redis_url, 99))
            with capture_logs() as logs:
                relay.hold()
                quota.spend(1_000)

                async def is_given_up() -> bool:
                    return any(line["event"] == "quotas_not_shared" for line in logs)

                await eventually(is_given_up)
                relay.release()
            quota.spend(10_000)
            await eventually(lambda: _spent(redis_url, 11_090))
            assert _hash(redis_url)["spent"] <= 11_100


async def test_an_unreadable_count_of_one_key_does_not_affect_other_keys(redis_url: str) -> None:
    """It is logged once with the key's name, not as an outage of Redis."""
    redis_command(redis_url, "SET", "outrider:key:{zoe}:streams", "foreign")
    limits = KeyLimits(tokens_per_minute=1)  # hardly any flow back during the test
    shared = SharedQuotas(redis_url)
    zoe, ada = Quota("zoe", limits), Quota("ada", limits)
    with capture_logs() as logs:
        async with shared.running():
            async with shared.stream(zoe), shared.stream(ada):
                zoe.spend(100)
                ada.spend(100)
                await eventually(lambda: _spent(redis_url, 99))
            for _ in range(3):
                ada.spend(100)
                expected = ada.num_spent - 10
                await eventually(lambda least=expected: _spent(redis_url, least))
    logged = [(log["event"], log.get("key")) for log in logs]
    assert logged == [("quota_unreadable", "zoe")]


async def test_limits_are_shared_again_after_many_calls_without_redis(redis_url: str) -> None:
    """They ended more streams than one report holds."""
    socket = redis_url.removeprefix("unix://")
    limits = KeyLimits(streams=1)
    async with Relay("127.0.0.1", 0, socket, 0, 0.0) as relay:
        here, elsewhere = SharedQuotas(f"redis://{relay.address}/0"), SharedQuotas(redis_url)
        async with here.running(), elsewhere.running():
            relay.refuses = True
            relay.reset()
            quota = Quota("ada", limits)
            for _ in range(10_000):
                async with here.stream(quota):
                    pass
            relay.refuses = False
            async with elsewhere.stream(Quota("ada", limits)):

                async def is_refused() -> bool:
                    try:
                        async with here.stream(quota):
                            return False
                    except CapacityExceeded:
                        return True

                await eventually(is_refused)


async def _spent(redis_url: str, least: int) -> bool:
    return (await asyncio.to_thread(_hash, redis_url)).get("spent", 0.0) >= least


async def test_a_resumption_is_not_charged_for_tokens_sent_before(
    tmp_path: Path, redis_url: str
) -> None:
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(tokens_per_minute=10**9))
    file = str(tmp_path / "keys")
    async with (
        tiers() as servers,
        orchestrated(servers, redis_url, api_keys_file=file) as system,
        client(system.endpoint, Access(api_key=keys["ada"])) as stub,
    ):
        output = await generated(stub, num_tokens=40, session_id="s", create_session=True)
        again = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=0)
        for _ in range(3):
            sent = [chunk async for chunk in stub.Generate(again, timeout=120)]
            assert [i for chunk in sent for i in chunk.token_ids] == output.token_ids
        await generated(stub, prompt=[7, 8, 9], num_tokens=4)

        async def are_all_charged_once() -> bool:
            fields = await asyncio.to_thread(_hash, redis_url)
            totals = [value for name, value in fields.items() if name not in ("spent", "at")]
            return totals == [3 + 40 + 3 + 4]

        await eventually(are_all_charged_once)


async def test_sessions_of_a_key_are_limited(tmp_path: Path, redis_url: str) -> None:
    """One more is refused until one is deleted or expires. Existing sessions can be used."""
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(sessions=2), bob=KeyLimits())
    settings = {"api_keys_file": str(tmp_path / "keys"), "max_sessions_per_key": 1}
    async with (
        tiers() as servers,
        orchestrated(servers, redis_url, **settings) as system,
        client(system.endpoint, Access(api_key=keys["ada"])) as ada,
        client(system.endpoint, Access(api_key=keys["bob"])) as bob,
    ):
        for name in ("a", "b", "a"):
            await generated(ada, session_id=name, create_session=True)
        refused = await refusal(generated(ada, session_id="c", create_session=True))
        assert (refused.code, bool(refused.retry_after_s)) == (Code.RESOURCE_EXHAUSTED, True)
        assert "2 sessions" in refused.message
        await generated(ada, session_id="b")
        await generated(ada)  # a one-off session is not stored
        await generated(bob, session_id="a", create_session=True)
        assert (await refusal(generated(bob, session_id="b", create_session=True))).code is (
            Code.RESOURCE_EXHAUSTED
        )
        deleting = orchestrator_pb2.DeleteSessionRequest(session_id="a")
        await ada.DeleteSession(deleting, timeout=60)
        bad = generated(ada, prompt=[1], num_tokens=10**6, session_id="c", create_session=True)
        assert (await refusal(bad)).code is Code.INVALID_ARGUMENT  # it is not counted
        await generated(ada, session_id="d", create_session=True)


async def test_expired_sessions_are_not_counted(tmp_path: Path, redis_url: str) -> None:
    """Also if another one, due by its time in the set, has been used since."""
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(sessions=2))
    file, session = str(tmp_path / "keys"), "outrider:session:{{ada/{}}}"
    async with (
        tiers() as servers,
        orchestrated(servers, redis_url, api_keys_file=file) as system,
        client(system.endpoint, Access(api_key=keys["ada"])) as ada,
    ):
        for name in ("a", "b"):
            await generated(ada, session_id=name, create_session=True)
            words = ("ZADD", "outrider:key:{ada}:sessions", "1", session.format(name))
            assert await asyncio.to_thread(redis_command, redis_url, *words) == b":0"
        refused = await refusal(generated(ada, session_id="c", create_session=True))
        assert refused.code is Code.RESOURCE_EXHAUSTED  # both still exist
        for name in ("a", "b"):
            words = ("ZADD", "outrider:key:{ada}:sessions", "1", session.format(name))
            await asyncio.to_thread(redis_command, redis_url, *words)
        await asyncio.to_thread(redis_command, redis_url, "DEL", session.format("a"))
        await generated(ada, session_id="c", create_session=True)
        assert (await refusal(generated(ada, session_id="d", create_session=True))).code is (
            Code.RESOURCE_EXHAUSTED
        )


SESSIONS = "outrider:key:{ada}:sessions"


def _left_ms(redis_url: str, *keys: str) -> list[int]:
    return [int(redis_command(redis_url, "PTTL", key)[1:]) for key in keys]


async def test_a_keys_set_of_sessions_outlives_its_sessions(tmp_path: Path, redis_url: str) -> None:
    """However long they are used. After Redis has lost the set, used sessions are added again."""
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(sessions=2))
    file = str(tmp_path / "keys")
    async with (
        tiers() as servers,
        orchestrated(servers, redis_url, api_keys_file=file) as system,
        client(system.endpoint, Access(api_key=keys["ada"])) as ada,
    ):
        for name in ("a", "b"):
            await generated(ada, session_id=name, create_session=True)
        # As if two hours had passed, in which both were used.
        assert (
            await asyncio.to_thread(redis_command, redis_url, "PEXPIRE", SESSIONS, "60000") == b":1"
        )
        await generated(ada, session_id="a")
        session = "outrider:session:{ada/a}"
        count_ms, session_ms = await asyncio.to_thread(_left_ms, redis_url, SESSIONS, session)
        assert count_ms > session_ms > 60_000

        assert await asyncio.to_thread(redis_command, redis_url, "DEL", SESSIONS) == b":1"
        await generated(ada)  # a one-off does not count
        for name in ("a", "b"):
            await generated(ada, session_id=name)
        refused = await refusal(generated(ada, session_id="c", create_session=True))
        assert (refused.code, bool(refused.retry_after_s)) == (Code.RESOURCE_EXHAUSTED, True)


@pytest.mark.slow
async def test_without_redis_each_orchestrator_enforces_its_own_count(tmp_path: Path) -> None:
    """Running generations go on."""
    with RedisServer() as server:
        async with two(tmp_path, server.url, KeyLimits(streams=1)) as (here, _):
            asked = request([1, 2], {**GREEDY, "max_tokens": 20_000})
            stream = here.Generate(asked, timeout=150)
            await stream.read()
            server.kill()
            refused = await refusal(generated(here))
            assert refused.code is Code.RESOURCE_EXHAUSTED
            assert "1 streams" in refused.message
            assert (await stream.read()).token_ids
            stream.cancel()

            async def is_accepted() -> bool:
                return (await refusal(generated(here))).code is Code.UNAVAILABLE

            await eventually(is_accepted)
