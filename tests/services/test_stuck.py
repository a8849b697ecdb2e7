"""A replica whose device is stuck: detected, logged, out of service, then back or ended.

The engine is simulated; the tested service around it is the real one.
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
    has_states,
    process_target,
    registered,
    tier,
)
from tests.services.streams import raw, row, target_open
from tests.services.stuck_target import NUM_TOKENS
from tests.stack import eventually

pytestmark = pytest.mark.slow

# A pass that is not blocked takes a millisecond: it never counts as stuck, even on a busy machine.
STUCK_AFTER_S = 2.0


async def test_stuck_and_back(redis_url: str, gate: Gate) -> None:
    """Not ready but alive; the log names the pass. When it ends, the replica is ready again."""
    async with (
        registered(redis_url) as registry,
        tier(redis_url=redis_url, stuck_after_s=STUCK_AFTER_S) as target,
        target.verify() as stream,
    ):
        await has_states(stream, READY)
        with capture_logs() as logs:
            gate.shut()
            await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
            await has_states(stream, READY, STUCK)
            await registry.becomes(ReplicaState.STUCK)
            assert not await target.is_healthy()
            assert await target.health(target_service.app.SERVICE_NAME) == NOT_SERVING
            assert await target.health(LIVENESS) == SERVING
            assert (await target.info()).state == STUCK
            await stream.write(Frame(opens=[target_open(2)]))
            assert (await stream.answer(2)).reason == target_pb2.RowError.REASON_DRAINING
        (entry,) = [entry for entry in logs if entry["event"] == "replica_stuck"]
        assert (entry["part"], entry["num_rows"], entry["num_tokens"]) == ("forward", 1, 4)
        assert "step" in entry["call"]
        assert entry["for_s"] >= STUCK_AFTER_S
        assert "gate.wait" in entry["stack"], "the line it is at"

        gate.open()
        await has_states(stream, READY, STUCK, READY)
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        await registry.becomes(ReplicaState.READY)
        await eventually(target.is_healthy, TIMEOUT_S)
        await stream.write(Frame(opens=[target_open(3)], rows=[row(3, 0, PROMPT)]))
        assert isinstance(await stream.answer(3), target_pb2.VerifyResult)
        await registry.becomes(ReplicaState.READY)  # the last record may arrive late
        assert stream.states == [READY, STUCK, READY]


async def test_a_stream_opened_while_stuck_gets_the_state(gate: Gate) -> None:
    async with tier(stuck_after_s=0.6) as target, target.verify() as stream:
        gate.shut()
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        await has_states(stream, READY, STUCK)
        async with target.verify() as late:
            await has_states(late, STUCK)
            gate.open()
            await has_states(late, STUCK, READY)


async def test_a_pass_of_the_expected_duration_is_not_stuck() -> None:
    """Calibrated at 1.5 s, which is more than `stuck_after_s`."""
    # At most 64 tokens, so that calibration is short. Anything but a pass may take a second.
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
    """The time between two checks does not count: the whole process was stopped."""
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
            while status.state is ReplicaState.STUCK:  # noqa: ASYNC110 (it checks periodically)
                await asyncio.sleep(0.01)
            watching.cancel()
    finally:
        gate.set()
        device.close()
    assert status.state is ReplicaState.READY


async def test_stuck_for_too_long_ends_it(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liveness is false while open generations have their grace."""
    has_heard = False
    # Nothing runs any more, so open generations would use all of the grace.
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
async def test_a_process_ends_although_its_device_is_stuck(way: str) -> None:
    """With a failure after being stuck for too long; cleanly after SIGTERM."""
    # Late enough: the stream on which the state is reported ends with the process.
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
        await has_states(stream, READY, STUCK)
        if way == "by SIGTERM":
            process.send_signal(signal.SIGTERM)
        end = await ended(process)
        assert (end.status == 0) == (way == "by SIGTERM"), end
        assert "replica_stuck" in end.stderr
