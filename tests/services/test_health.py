"""Health, reflection, and calls that arrive before the service is ready."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import orchestrator.app
import orchestrator.health
import outrider.model_server.lifecycle
import target_service.app
from outrider.redis.embedded import RedisServer
from outrider.settings.services import TargetConfig
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc, target_pb2, target_pb2_grpc
from tests.redis_fixture import redis_command
from tests.services.parts import GREEDY, Pair, Tiers, both_tiers, orchestrating, refusal
from tests.services.replicas import Gate, tier
from tests.stack import eventually, request

Status = health_pb2.HealthCheckResponse
TARGET = target_service.app.SERVICE_NAME


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    asked = health_pb2.HealthCheckRequest(service=service)
    return int((await stub.Check(asked, timeout=60)).status)


@contextlib.asynccontextmanager
async def still_loading(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[int, threading.Event, asyncio.Event]]:
    """A target whose model is loading: its port, an event to continue, its task."""
    go_on, serves, stop = threading.Event(), asyncio.Event(), asyncio.Event()
    ports: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    load, start = (
        outrider.model_server.lifecycle.load_served_engine,
        outrider.runtime.grpc_server.Server.start,
    )

    def slow_load(config: Any) -> Any:
        assert go_on.wait(120)
        return load(config)

    async def recording_start(server: Any, host: str, port: int) -> None:
        await start(server, host, port)
        loop.call_soon(ports.put_nowait, server.port)

    monkeypatch.setattr(outrider.model_server.lifecycle, "load_served_engine", slow_load)
    monkeypatch.setattr(outrider.runtime.grpc_server.Server, "start", recording_start)

    async def serve() -> None:
        config = TargetConfig(model=str(pair.target), port=0, kv_cache_tokens=1024)
        async with target_service.app.serving(config):
            serves.set()
            await stop.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve())
        try:
            yield await ports.get(), go_on, serves
        finally:
            go_on.set()
            stop.set()


async def test_health_while_loading_and_after(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        still_loading(pair, monkeypatch) as (port, go_on, serves),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        for service in ("", TARGET):
            assert await health(channel, service) == Status.NOT_SERVING
        stub = target_pb2_grpc.TargetServiceStub(channel)
        early = await refusal(stub.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest()))
        # After UNIMPLEMENTED clients would not retry.
        assert early.code is grpc.StatusCode.UNAVAILABLE
        go_on.set()
        await serves.wait()
        for service in ("", TARGET):
            assert await health(channel, service) == Status.SERVING
        await stub.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest())
        unknown = await refusal(health(channel, "no.such.Service"))
        assert unknown.code is grpc.StatusCode.NOT_FOUND


async def test_an_orchestrator_without_its_target(pair: Pair, redis_url: str) -> None:
    """It waits for the target and is not ready; calls get a retry hint meanwhile."""
    import orchestrator.app as service
    from outrider.settings.services import OrchestratorConfig

    ports: asyncio.Queue[int] = asyncio.Queue()
    start = outrider.runtime.grpc_server.Server.start

    async def recording_start(server: Any, host: str, port: int) -> None:
        await start(server, host, port)
        ports.put_nowait(server.port)

    async def serve() -> None:
        config = OrchestratorConfig(
            target_endpoint="127.0.0.1:1", draft_endpoint=None, redis_url=redis_url, port=0
        )
        async with service.serving(config):
            raise AssertionError("it serves without a target")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outrider.runtime.grpc_server.Server, "start", recording_start)
        serving = asyncio.create_task(serve())
        port = await ports.get()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert await health(channel) == Status.NOT_SERVING
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            early = await refusal(anext(aiter(stub.Generate(request([1]), timeout=60))))
            assert early.code is grpc.StatusCode.UNAVAILABLE
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


@pytest.mark.slow
@pytest.mark.parametrize("without_redis", ["refuse", "unrecorded"])
async def test_an_orchestrator_without_redis(
    without_redis: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays ready, so that clients get a clear error; the health name `redis` is for monitors.

    Also if Redis answers but rejects writes; it is noticed without any call.
    """
    monkeypatch.setattr(orchestrator.health, "REDIS_CHECK_S", 0.05)
    with RedisServer(keeps_data=True) as redis:
        async with (
            both_tiers(pair, draft_kv=None) as tiers,
            orchestrating(tiers, redis.url, without_redis=without_redis) as stack,
            grpc.aio.insecure_channel(stack.endpoint) as channel,
        ):

            async def has_redis_health(status: int) -> bool:
                return await health(channel, "redis") == status

            async def is_ready_and_serves() -> None:
                names = ("", orchestrator.app.SERVICE_NAME, "liveness")
                for name in names:
                    assert await health(channel, name) == Status.SERVING
                asked = {"sampling": {**GREEDY, "max_tokens": 4}}
                if without_redis == "unrecorded":
                    output = await stack.generate([1, 2], **asked)
                    assert output.result is not None
                    assert not output.result.recorded
                    return
                refused = await refusal(stack.generate([1, 2], **asked))
                assert refused.code is grpc.StatusCode.UNAVAILABLE
                assert refused.retry_after_s is not None
                assert "Redis" in refused.message

            await eventually(lambda: has_redis_health(Status.SERVING))
            assert redis_command(redis.url, "CONFIG SET min-replicas-to-write 1") == b"+OK"
            await eventually(lambda: has_redis_health(Status.NOT_SERVING))
            await is_ready_and_serves()
            assert redis_command(redis.url, "CONFIG SET min-replicas-to-write 0") == b"+OK"
            await eventually(lambda: has_redis_health(Status.SERVING))
            redis.kill()
            await eventually(lambda: has_redis_health(Status.NOT_SERVING))
            await is_ready_and_serves()
            redis.start()
            await eventually(lambda: has_redis_health(Status.SERVING))
            output = await stack.generate([1, 2], sampling={**GREEDY, "max_tokens": 4})
            assert output.result is not None
            assert output.result.recorded
            assert redis_command(redis.url, "DBSIZE") == b":0"


async def test_health_answers_while_a_pass_runs(redis_url: str, gate: Gate) -> None:
    """Probes do not wait for a pass: the event loop never runs one."""
    async with (
        tier() as target,
        orchestrating(Tiers(target.server, None), redis_url) as stack,
        grpc.aio.insecure_channel(stack.endpoint) as channel,
    ):
        gate.shut()
        running = asyncio.create_task(
            stack.generate([1, 2, 3], sampling={**GREEDY, "max_tokens": 4})
        )
        try:
            await eventually(gate.holds_a_pass)
            for probed in (channel, target.channel) * 5:
                assert await health(probed) == Status.SERVING
            assert await gate.holds_a_pass()
            assert not running.done()
        finally:
            gate.open()
        assert len((await running).token_ids) == 4


async def test_reflection_lists_the_services(pair: Pair, redis_url: str) -> None:
    async with both_tiers(pair) as tiers, orchestrating(tiers, redis_url) as stack:
        for endpoint, name in zip(
            (stack.endpoint, *tiers.endpoints),
            ("OrchestratorService", "TargetService", "DraftService"),
            strict=True,
        ):
            async with grpc.aio.insecure_channel(str(endpoint)) as channel:
                listed, described = await _reflected(channel, f"outrider.v1.{name}")
            assert listed == {
                f"outrider.v1.{name}",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            assert described
        assert isinstance(
            await stack.client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest()),
            orchestrator_pb2.GetModelInfoResponse,
        )


async def _reflected(channel: grpc.aio.Channel, name: str) -> tuple[set[str], bool]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {service.name for service in (await call.read()).list_services_response.service}
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
    described = (await call.read()).HasField("file_descriptor_response")
    call.cancel()
    return listed, described
