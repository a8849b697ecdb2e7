"""A replica whose device is stuck: seen, named, out of service, and back; or ended.

The tiers are simulated: what is tested is the service around an engine, which is the same.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

import target_service.app
from outrider.engine import DeviceThread
from outrider.errors import InternalError
from outrider.model_server import watchdog as progress
from outrider.model_server.replica_status import ReplicaStatus
from outrider.model_server.scheduler import Scheduler
from outrider.redis.registry import ReplicaState
from outrider.replica import CostReport
from outrider.runtime.grpc_server import LIVENESS
from outrider.v1 import target_pb2
from tests.services.noting import Clock
from tests.services.programs import ended
from tests.services.replicas import (
    NOT_SERVING,
    PROMPT,
    READY,
    SERVING,
    STUCK,
    TIMEOUT_S,
    Frame,
    Gate,
    process_target,
    registered,
    tier,
    told,
)
from tests.services.streams import raw, row, target_open
from tests.services.stuck_target import NUM_TOKENS
from tests.stack import eventually

pytestmark = pytest.mark.slow

# A pass that is not held takes a millisecond: no machine is so busy that it would count as stuck.
STUCK_AFTER_S = 2.0


async def test_stuck_and_back(redis_url: str, gate: Gate) -> None:
    """Not ready, and alive; what was stuck is named; then the pass ends and all is as before."""
    async with (
        registered(redis_url) as registry,
        tier(redis_url=redis_url, stuck_after_s=STUCK_AFTER_S) as target,
        target.verify() as stream,
    ):
        await told(stream, READY)
        with capture_logs() as logs:
            gate.shut()
            await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
            await told(stream, READY, STUCK)
            await registry.becomes(ReplicaState.STUCK)
            assert not await target.is_healthy()
            assert await target.health(target_service.app.SERVICE_NAME) == NOT_SERVING
            assert await target.health(LIVENESS) == SERVING
            assert (await target.info()).state == STUCK
            await stream.write(Frame(opens=[target_open(2)]))
            assert (await stream.answer(2)).reason == target_pb2.RowError.REASON_DRAINING
        (said,) = [entry for entry in logs if entry["event"] == "replica_stuck"]
        assert (said["part"], said["num_rows"], said["num_tokens"]) == ("forward", 1, 4)
        assert "step" in said["call"]
        assert said["for_s"] >= STUCK_AFTER_S
        assert "gate.wait" in said["stack"], "the line where it is"

        gate.open()
        await told(stream, READY, STUCK, READY)
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        await registry.becomes(ReplicaState.READY)
        await eventually(target.is_healthy, TIMEOUT_S)
        await stream.write(Frame(opens=[target_open(3)], rows=[row(3, 0, PROMPT)]))
        assert isinstance(await stream.answer(3), target_pb2.VerifyResult)
        await registry.becomes(ReplicaState.READY)  # and still is, but for a record that came late
        assert stream.states == [READY, STUCK, READY]


async def test_a_stream_that_begins_while_it_is_stuck_is_told(gate: Gate) -> None:
    async with tier(stuck_after_s=0.6) as target, target.verify() as stream:
        gate.shut()
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        await told(stream, READY, STUCK)
        async with target.verify() as late:
            await told(late, STUCK)
            gate.open()
            await told(late, STUCK, READY)


async def test_passes_may_take_what_they_are_expected_to_take() -> None:
    """Measured at the start as 1.5 s: more than `stuck_after_s`, and no reason to leave."""
    # Of 64 tokens, so that measuring takes no longer. What is not a pass has a second.
    steps = "1:1/63:1/64:1500/65:1500"
    async with (
        tier(simulate=f"step_ms={steps},vocab_size=256", stuck_after_s=1.0) as target,
        target.verify() as stream,
    ):
        await stream.write(Frame(opens=[target_open(1)]))
        for token in (7, 8):
            await stream.write(Frame(rows=[row(1, 0, [token] * 64)]))
            await stream.answer(1)
        assert stream.states == [READY]


async def test_a_process_that_was_suspended_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passed between two looks alone was not the device's: all of the process stood."""
    clock, status, gate = Clock(), ReplicaStatus(), threading.Event()
    monkeypatch.setattr(progress, "time", clock)
    device = DeviceThread()
    watchdog = progress.Watchdog(device, status, CostReport, stuck_after_s=3, exit_after_s=99)
    status.serve()
    try:
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(watchdog.run())
            working = tasks.create_task(device.run(gate.wait, TIMEOUT_S))
            for _ in range(3):
                await asyncio.sleep(2 * progress.CHECK_INTERVAL_S)
                clock.now += 1_000
            assert status.state is ReplicaState.READY
            while status.state is ReplicaState.READY:
                await asyncio.sleep(progress.CHECK_INTERVAL_S)
                clock.now += 0.4
            gate.set()
            await working
            while status.state is ReplicaState.STUCK:  # noqa: ASYNC110 (it looks now and then)
                await asyncio.sleep(0.01)
            watching.cancel()
    finally:
        gate.set()
        device.close()
    assert status.state is ReplicaState.READY


async def test_stuck_for_too_long_ends_it(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not alive any more, as probes see while what is open has its grace."""
    has_heard = False
    # Nothing is run for it any more, so that what is open would have all of its grace.
    monkeypatch.setattr(Scheduler, "is_idle", property(lambda _: has_heard))
    settings = {"stuck_after_s": 0.6, "stuck_exit_s": 0.3, "stop_grace_s": TIMEOUT_S}
    async with tier(**settings) as target, target.verify() as stream:
        stub = health_pb2_grpc.HealthStub(target.channel)
        alive = stub.Watch(health_pb2.HealthCheckRequest(service=LIVENESS))
        assert (await alive.read()).status == SERVING
        gate.shut()
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        async with asyncio.timeout(TIMEOUT_S):
            assert (await alive.read()).status == NOT_SERVING
        has_heard = True
        alive.cancel()
        gate.open()
        with pytest.raises(BaseExceptionGroup) as caught:
            await target.has_ended()
        stuck, rest = caught.value.split(InternalError)
        assert rest is None
        assert "the device is stuck" in str(_leaf(stuck))


def _leaf(error: Any) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, BaseException)
    return error


@pytest.mark.timeout(150)
@pytest.mark.parametrize("way", ["by itself", "by SIGTERM"])
async def test_a_process_ends_though_its_device_never_does(way: str) -> None:
    """Once stuck for too long, as a failure; or told to, cleanly."""
    # Not sooner: that it is stuck is told on a stream that ends with it.
    exit_s = "3" if way == "by itself" else "300"
    words = ("--stuck-after-s", "0.6", "--stuck-exit-s", exit_s, "--stop-grace-s", "0.2")
    async with (
        process_target("tests.services.stuck_target", *words, "--max-step-tokens", "2000") as (
            process,
            stub,
        ),
        raw(stub.Verify()) as stream,
    ):
        opening = target_open(1, prompt_len=NUM_TOKENS, max_len=NUM_TOKENS + 10)
        await stream.write(Frame(opens=[opening], rows=[row(1, 0, [7] * NUM_TOKENS)]))
        await told(stream, READY, STUCK)
        if way == "by SIGTERM":
            process.send_signal(signal.SIGTERM)
        end = await ended(process)
        assert (end.status == 0) == (way == "by SIGTERM"), end
        assert "replica_stuck" in end.stderr
