"""What the orchestrator says of what it depends on: replicas, Redis, who waits for it."""

from __future__ import annotations

import asyncio
import contextlib

import grpc

from outrider.redis.embedded import RedisServer
from tests.stack import eventually, request
from tests.telemetry.parts import Services, prompt, scrape, services

METERED = {"metrics_port": 0}
LONG = {"temperature": 0, "ignore_eos": True, "max_tokens": 20_000}


async def test_replicas_are_told_by_their_state(redis_url: str) -> None:
    """Ready, then away once it is gone; the other tier stays what it is."""
    async with services(redis_url, METERED) as system:
        assert system.draft is not None
        said = await scrape(system.orchestrator)
        for tier in ("target", "draft"):
            assert said("outrider_replicas", tier=tier, state="ready") == 1
            assert said("outrider_replicas", tier=tier, state="away") == 0
        await system.draft.grpc_server.stop(None)

        async def is_away() -> bool:
            said = await scrape(system.orchestrator)
            return said("outrider_replicas", tier="draft", state="away") == 1

        await eventually(is_away)
        said = await scrape(system.orchestrator)
        assert said("outrider_replicas", tier="draft", state="ready") == 0
        assert said("outrider_replicas", tier="target", state="ready") == 1


async def test_who_runs_and_who_waits_is_told(redis_url: str) -> None:
    """One at a time here: the second waits for its turn. γ is that of the running one."""
    async with services(redis_url, METERED, max_generations=1) as system:
        calls = [
            system.client.Generate(request(prompt(number), LONG), timeout=200)
            for number in range(2)
        ]
        reading = [asyncio.create_task(_read(call)) for call in calls]

        async def is_full() -> bool:
            said = await scrape(system.orchestrator)
            return (
                said("outrider_num_requests_running") == 1
                and said("outrider_num_requests_waiting") == 1
                and said("outrider_gamma") > 0
            )

        await eventually(is_full)
        said, target = await scrape(system.orchestrator), await scrape(system.target)
        assert sum(said.by("outrider_replica_generations", "tier").values()) == 2
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
    said, target = await scrape(system.orchestrator), await scrape(system.target)
    return (
        said("outrider_num_requests_running") == said("outrider_num_requests_waiting") == 0
        and said("outrider_gamma") == 0
        and target("outrider_open_generations", tier="target") == 0
        and target("outrider_kv_cache_usage_perc", tier="target") == 0
    )


async def test_kv_that_can_be_freed_is_not_in_use(redis_url: str) -> None:
    """Sessions that are kept, and what is cached: without load the gauge that is scaled on is 0."""
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": 30}
    async with services(redis_url, METERED) as system:
        for number in range(3):
            fields = {"session_id": f"s{number}", "create_session": True}
            async for _ in system.client.Generate(
                request(prompt(number, 200), sampling, **fields), timeout=150
            ):
                pass

        async def is_kept_and_not_used() -> bool:
            said = await scrape(system.target)
            return (
                said("outrider_idle_sessions", tier="target") == 3
                and said("outrider_kv_cache_usage_perc", tier="target") == 0
            )

        await eventually(is_kept_and_not_used)


async def test_redis_that_is_away_is_told() -> None:
    """As soon as somebody wanted something of it; and that it is back."""
    asked = request(prompt(0), {"temperature": 0, "max_tokens": 1, "ignore_eos": True})
    with RedisServer(keeps_data=True) as redis:
        async with services(redis.url, METERED, has_draft=False, gamma=0) as system:
            assert (await scrape(system.orchestrator))("outrider_redis_up") == 1
            redis.kill()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await _read(system.client.Generate(asked, timeout=150))
            said = await scrape(system.orchestrator)
            assert said("outrider_redis_up") == 0
            assert said("outrider_requests_total", status="UNAVAILABLE") == 1
            redis.start()

            async def is_up() -> bool:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await _read(system.client.Generate(asked, timeout=150))
                return (await scrape(system.orchestrator))("outrider_redis_up") == 1

            await eventually(is_up)
