"""Metrics of the orchestrator's dependencies: replicas, Redis, the admission queue."""

from __future__ import annotations

import asyncio
import contextlib

import grpc

from outrider.redis.embedded import RedisServer
from tests.stack import eventually, request
from tests.telemetry.parts import Services, prompt, scrape, services

METERED = {"metrics_port": 0}
LONG = {"temperature": 0, "ignore_eos": True, "max_tokens": 20_000}


async def test_replicas_are_counted_by_state(redis_url: str) -> None:
    """Ready, then away once it has stopped; the other tier does not change."""
    async with services(redis_url, METERED) as system:
        assert system.draft is not None
        exposed = await scrape(system.orchestrator)
        for tier in ("target", "draft"):
            assert exposed("outrider_replicas", tier=tier, state="ready") == 1
            assert exposed("outrider_replicas", tier=tier, state="away") == 0
        await system.draft.grpc_server.stop(None)

        async def is_away() -> bool:
            exposed = await scrape(system.orchestrator)
            return exposed("outrider_replicas", tier="draft", state="away") == 1

        await eventually(is_away)
        exposed = await scrape(system.orchestrator)
        assert exposed("outrider_replicas", tier="draft", state="ready") == 0
        assert exposed("outrider_replicas", tier="target", state="ready") == 1


async def test_running_and_queued_requests_are_counted(redis_url: str) -> None:
    """Only one may run, so the second is queued. γ is that of the running request."""
    async with services(redis_url, METERED, max_generations=1) as system:
        calls = [
            system.client.Generate(request(prompt(number), LONG), timeout=200)
            for number in range(2)
        ]
        reading = [asyncio.create_task(_read(call)) for call in calls]

        async def is_full() -> bool:
            exposed = await scrape(system.orchestrator)
            return (
                exposed("outrider_num_requests_running") == 1
                and exposed("outrider_num_requests_waiting") == 1
                and exposed("outrider_gamma") > 0
            )

        await eventually(is_full)
        exposed, target = await scrape(system.orchestrator), await scrape(system.target)
        assert sum(exposed.by("outrider_replica_generations", "tier").values()) == 2
        assert target("outrider_open_generations", tier="target") == 1
        assert 0 < target("outrider_kv_cache_usage_perc", tier="target") <= 1
        for call in calls:
            call.cancel()
        await asyncio.gather(*reading)
        await eventually(lambda: _is_idle(system))


async def _read(call: grpc.aio.UnaryStreamCall[object, object]) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        async for _ in call:
            pass


async def _is_idle(system: Services) -> bool:
    exposed, target = await scrape(system.orchestrator), await scrape(system.target)
    return (
        exposed("outrider_num_requests_running") == exposed("outrider_num_requests_waiting") == 0
        and exposed("outrider_gamma") == 0
        and target("outrider_open_generations", tier="target") == 0
        and target("outrider_kv_cache_usage_perc", tier="target") == 0
    )


async def test_kv_that_can_be_freed_is_not_in_use(redis_url: str) -> None:
    """Idle sessions and cached prefixes: the gauge used for autoscaling is 0 without load."""
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": 30}
    async with services(redis_url, METERED) as system:
        for number in range(3):
            fields = {"session_id": f"s{number}", "create_session": True}
            async for _ in system.client.Generate(
                request(prompt(number, 200), sampling, **fields), timeout=150
            ):
                pass

        async def is_cached_and_not_used() -> bool:
            exposed = await scrape(system.target)
            return (
                exposed("outrider_idle_sessions", tier="target") == 3
                and exposed("outrider_kv_cache_usage_perc", tier="target") == 0
            )

        await eventually(is_cached_and_not_used)


async def test_redis_up_follows_redis() -> None:
    """The gauge falls after the first failed command and rises again when Redis is back."""
    asked = request(prompt(0), {"temperature": 0, "max_tokens": 1, "ignore_eos": True})
    with RedisServer(keeps_data=True) as redis:
        async with services(redis.url, METERED, has_draft=False, gamma=0) as system:
            assert (await scrape(system.orchestrator))("outrider_redis_up") == 1
            redis.kill()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await _read(system.client.Generate(asked, timeout=150))
            exposed = await scrape(system.orchestrator)
            assert exposed("outrider_redis_up") == 0
            assert exposed("outrider_requests_total", status="UNAVAILABLE") == 1
            redis.start()

            async def is_up() -> bool:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await _read(system.client.Generate(asked, timeout=150))
                return (await scrape(system.orchestrator))("outrider_redis_up") == 1

            await eventually(is_up)
