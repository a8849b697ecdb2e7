"""What a key may use: the bucket by a clock of our own, and one count for all orchestrators."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from orchestrator.quota import Quota
from outrider.errors import CapacityExceeded
from outrider.redis_server import RedisServer
from outrider.security.channel import Access
from outrider.security.keys import KeyLimits
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
    """A minute's worth at once; what goes beyond is waited for, to the token."""
    clock = Clock()
    quota = Quota("ada", KeyLimits(tokens_per_minute=600), clock)
    for _ in range(2):
        with quota.stream():
            quota.spend(300)
    with pytest.raises(CapacityExceeded) as caught, quota.stream():
        raise AssertionError("it is let in")
    assert caught.value.retry_after_s == pytest.approx(0.1)
    clock.now_s += 0.05
    with pytest.raises(CapacityExceeded), quota.stream():
        raise AssertionError("it is let in")
    clock.now_s += 0.06
    with quota.stream():
        quota.spend(1_200)
    with pytest.raises(CapacityExceeded) as caught, quota.stream():
        raise AssertionError("it is let in")
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
    assert quota.num_untold == 0, "nobody has to be told"


@contextlib.asynccontextmanager
async def two(folder: Path, redis_url: str, limits: KeyLimits) -> AsyncIterator[tuple[Any, Any]]:
    """Ada's clients of two orchestrators, of the same tiers and keys."""
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
    """One at the first leaves none at the second, until it ends."""
    async with two(tmp_path, redis_url, KeyLimits(streams=1)) as (here, there):
        asked = request([1, 2], {**GREEDY, "max_tokens": 20_000})
        stream = here.Generate(asked, timeout=150)
        await stream.read()
        refused = await refusal(generated(there))
        assert (refused.code, bool(refused.retry_after_s)) == (Code.RESOURCE_EXHAUSTED, True)
        stream.cancel()

        async def is_let_in() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return bool(await generated(there))
            return False

        await eventually(is_let_in)
        for _ in range(3):  # an end is known at once where it was
            await generated(there)


async def test_tokens_count_at_all_orchestrators(tmp_path: Path, redis_url: str) -> None:
    """Spent at the first, they are missing at the second within a second or two."""
    limits = KeyLimits(tokens_per_minute=60)
    async with two(tmp_path, redis_url, limits) as (here, there):
        await generated(here, num_tokens=400)

        async def is_refused() -> bool:
            """For the 400: what is asked here meanwhile is refused too, for some seconds each."""
            try:
                await generated(there, num_tokens=1)
            except grpc.aio.AioRpcError as error:
                refused = Refusal(error.code(), "", rpc_status.from_call(error))
                assert refused.code is Code.RESOURCE_EXHAUSTED
                return (refused.retry_after_s or 0.0) > 100
            return False

        await eventually(is_refused)


@pytest.mark.slow
async def test_without_redis_each_counts_its_own(tmp_path: Path) -> None:
    """Limits hold at each orchestrator, and calls go on."""
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

            async def is_past_the_gate() -> bool:
                return (await refusal(generated(here))).code is Code.UNAVAILABLE

            await eventually(is_past_the_gate)
