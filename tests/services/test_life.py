"""A replica's states: what probes, streams and the registry are told, and what it then still does.

The tiers are simulated: what is tested is the service around an engine, which is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

import draft_service.service
import outrider.serving.life
import target_service.service
from outrider.config import DraftConfig, ModelServiceConfig, TargetConfig
from outrider.costs import CostReport
from outrider.engine import Append, DeviceThread
from outrider.engine.simulated import SimulatedEngine
from outrider.errors import InternalError
from outrider.program import LISTENING_PREFIX
from outrider.registry import Replica, ReplicaState, Watcher
from outrider.server import LIVENESS, Server
from outrider.serving import progress
from outrider.serving.status import ReplicaStatus
from outrider.simulation import Simulation
from outrider.v1 import draft_pb2, draft_pb2_grpc, model_pb2, target_pb2, target_pb2_grpc
from tests.services.noting import Clock
from tests.services.streams import Stream, draft_commit, draft_open, raw, row, target_open
from tests.services.stuck_target import NUM_TOKENS
from tests.services.test_startup import END_TIMEOUT_S, ended, program
from tests.stack import eventually

TIMEOUT_S = 20.0
PROMPT = [3, 1, 4, 1]
Frame = target_pb2.VerifyRequest
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)
READY, DRAINING, STUCK = (
    model_pb2.REPLICA_STATE_READY,
    model_pb2.REPLICA_STATE_DRAINING,
    model_pb2.REPLICA_STATE_STUCK,
)
SETTINGS: dict[str, Any] = {
    "simulate": "step_ms=1,vocab_size=256",
    "port": 0,
    "kv_cache_tokens": 4096,
    "calibration_s": 0.0,
}


@dataclass
class Tier:
    """A replica in this process. `stop` is what SIGTERM does; `serving` ends when it has."""

    server: Server
    channel: grpc.aio.Channel
    stop: Callable[[], None]
    serving: asyncio.Task[None]

    async def health(self, name: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        asked = health_pb2.HealthCheckRequest(service=name)
        return int((await stub.Check(asked, timeout=10)).status)

    async def is_healthy(self) -> bool:
        return await self.health() == SERVING

    async def info(self) -> target_pb2.TargetServiceGetModelInfoResponse:
        stub = target_pb2_grpc.TargetServiceStub(self.channel)
        return await stub.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest(), timeout=10)

    def verify(self) -> Any:
        return raw(target_pb2_grpc.TargetServiceStub(self.channel).Verify())

    async def has_ended(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.serving


@contextlib.asynccontextmanager
async def tier(
    kind: type[ModelServiceConfig] = TargetConfig, **settings: Any
) -> AsyncIterator[Tier]:
    """Ends with the block, if it has not before; what `serving` raises is its owner's."""
    config: Any = kind(**SETTINGS | settings)
    service: Any = target_service.service if kind is TargetConfig else draft_service.service
    started: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def serve() -> None:
        async with service.serving(config) as server:
            started.set_result(server)
            await stop.wait()

    task = asyncio.create_task(serve())
    await asyncio.wait([task, started], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    server = await started
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        try:
            yield Tier(server, channel, stop.set, task)
        finally:
            stop.set()
            await asyncio.wait([task])


@dataclass
class Registered:
    """What the registry says of a tier's only replica: all it ever said, and now."""

    said: list[Replica | None] = field(default_factory=list)

    def tell(self, replicas: list[Replica]) -> None:
        assert len(replicas) <= 1
        self.said.append(replicas[0] if replicas else None)

    @property
    def states(self) -> list[ReplicaState | None]:
        """Each once in a row."""
        states = [replica.state if replica else None for replica in self.said]
        return [s for i, s in enumerate(states) if not i or s is not states[i - 1]]

    async def becomes(self, state: ReplicaState | None) -> Replica | None:
        async def has() -> bool:
            return bool(self.states) and self.states[-1] is state

        await eventually(has, TIMEOUT_S)
        return self.said[-1]


@contextlib.asynccontextmanager
async def registered(url: str, name: str = "target") -> AsyncIterator[Registered]:
    registry = Registered()
    watching = asyncio.create_task(Watcher(url, name, registry.tell).run())
    try:
        yield registry
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def told(stream: Stream, *states: int) -> None:
    """Returns when these were told on the stream, and nothing else."""

    async def has() -> bool:
        return len(stream.states) >= len(states)

    await eventually(has, TIMEOUT_S)
    assert stream.states == list(states)


class Gate:
    """Passes of a prompt wait while it is shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.shut, self.open = self._open.clear, self._open.set

    def engine(self, config: ModelServiceConfig) -> SimulatedEngine:
        gate = self._open

        class Gated(SimulatedEngine):
            def forward(self, appends: Sequence[Append]) -> None:
                assert gate.wait(2 * TIMEOUT_S)
                super().forward(appends)

        return Gated(Simulation.parse(config.simulate or ""), config.kv_cache_tokens)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Of the engine of each tier that is started."""
    gate = Gate()
    load = outrider.serving.life.load_served_engine
    monkeypatch.setattr(
        outrider.serving.life,
        "load_served_engine",
        lambda config: (gate.engine(config), load(config)[1]),
    )
    return gate


async def test_announced_while_it_loads_and_serves(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, go_on = outrider.serving.life.load_served_engine, threading.Event()

    def slow_load(config: Any) -> Any:
        assert go_on.wait(TIMEOUT_S)
        return load(config)

    monkeypatch.setattr(outrider.serving.life, "load_served_engine", slow_load)
    async with registered(redis_url) as registry:

        async def let_go() -> None:
            try:
                starting = await registry.becomes(ReplicaState.STARTING)
                assert starting is not None
                assert (starting.tier, starting.vocab_size) == ("target", 0)
            finally:
                go_on.set()

        letting = asyncio.create_task(let_go())
        async with tier(redis_url=redis_url) as target:
            await letting
            ready = await registry.becomes(ReplicaState.READY)
            model = (await target.info()).model
            assert ready is not None
            assert ready.address == f"127.0.0.1:{target.server.port}"
            assert ready.model_fingerprint == model.model_fingerprint
            assert ready.tokenizer_fingerprint == model.tokenizer_fingerprint
            assert (ready.vocab_size, ready.kv_capacity_tokens) == (256, 4096)
            async with target.verify() as stream:
                await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
                await stream.answer(1)

                async def is_counted() -> bool:
                    last = registry.said[-1]
                    return last is not None and (
                        last.num_open_generations == 1 and last.kv_used_tokens > 0
                    )

                await eventually(is_counted, TIMEOUT_S)
        await registry.becomes(None)


@pytest.mark.parametrize(
    ("settings", "address"),
    [({"advertise": "far.example:7"}, "far.example:7"), ({"host": "0.0.0.0"}, None)],
)
async def test_the_address_it_gives(
    settings: dict[str, Any], address: str | None, redis_url: str
) -> None:
    """What it was told; or where it listens everywhere, a place that others can reach."""
    async with registered(redis_url) as registry, tier(redis_url=redis_url, **settings) as target:
        ready = await registry.becomes(ReplicaState.READY)
        assert ready is not None
        if address is not None:
            assert ready.address == address
        else:
            host, _, port = ready.address.rpartition(":")
            assert host not in ("0.0.0.0", "127.0.0.1", "")
            assert int(port) == target.server.port


async def test_draining_ends_what_is_open_and_takes_nothing_new(redis_url: str) -> None:
    async with (
        registered(redis_url) as registry,
        tier(redis_url=redis_url, stop_grace_s=TIMEOUT_S) as target,
        target.verify() as stream,
    ):
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        await told(stream, READY)

        target.stop()
        await told(stream, READY, DRAINING)
        await registry.becomes(ReplicaState.DRAINING)
        assert not await target.is_healthy()
        assert await target.health(LIVENESS) == SERVING
        assert (await target.info()).state == DRAINING

        await stream.write(Frame(opens=[target_open(2)]))
        refused = await stream.answer(2)
        assert refused.reason == target_pb2.RowError.REASON_DRAINING
        async with target.verify() as other:
            await other.write(Frame(opens=[target_open(1)]))
            assert (await other.answer(1)).reason == target_pb2.RowError.REASON_DRAINING
            await told(other, DRAINING)

        await stream.write(Frame(rows=[row(1, 4, [5], [6, 7])]))
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        assert not target.serving.done()
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=1)]))
        await target.has_ended()
        await registry.becomes(None)
    assert ReplicaState.STUCK not in registry.states


async def test_a_draft_drains_likewise(redis_url: str) -> None:
    async with (
        registered(redis_url, "draft") as registry,
        tier(DraftConfig, redis_url=redis_url, stop_grace_s=TIMEOUT_S) as draft,
        raw(draft_pb2_grpc.DraftServiceStub(draft.channel).Propose()) as stream,
    ):
        await stream.write(draft_pb2.ProposeRequest(opens=[draft_open(1, PROMPT)]))
        await told(stream, READY)
        await registry.becomes(ReplicaState.READY)

        async def is_open() -> bool:
            last = registry.said[-1]
            return last is not None and last.num_open_generations == 1

        await eventually(is_open, TIMEOUT_S)
        draft.stop()
        await told(stream, READY, DRAINING)
        await registry.becomes(ReplicaState.DRAINING)
        await stream.write(draft_pb2.ProposeRequest(opens=[draft_open(2, PROMPT)]))
        assert (await stream.answer(2)).reason == draft_pb2.DraftLost.REASON_DRAINING
        await stream.write(draft_pb2.ProposeRequest(commits=[draft_commit(1, [5], 5)]))
        assert isinstance(await stream.answer(1), draft_pb2.Proposal)
        await stream.write(draft_pb2.ProposeRequest(closes=[draft_pb2.DraftClose(generation_id=1)]))
        await draft.has_ended()


async def test_a_generation_that_does_not_end_does_not_hold_it() -> None:
    async with tier(stop_grace_s=0.3) as target, target.verify() as stream:
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        await stream.answer(1)
        target.stop()
        await target.has_ended()


async def test_stuck_and_back(redis_url: str, gate: Gate) -> None:
    """Not ready, and alive; what was stuck is named; then the pass ends and all is as before."""
    async with (
        registered(redis_url) as registry,
        tier(redis_url=redis_url, stuck_after_s=0.6) as target,
        target.verify() as stream,
    ):
        await told(stream, READY)
        with capture_logs() as logs:
            gate.shut()
            await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
            await told(stream, READY, STUCK)
            await registry.becomes(ReplicaState.STUCK)
            assert not await target.is_healthy()
            assert await target.health(target_service.service.SERVICE_NAME) == NOT_SERVING
            assert await target.health(LIVENESS) == SERVING
            assert (await target.info()).state == STUCK
            await stream.write(Frame(opens=[target_open(2)]))
            assert (await stream.answer(2)).reason == target_pb2.RowError.REASON_DRAINING
        (said,) = [entry for entry in logs if entry["event"] == "replica_stuck"]
        assert (said["part"], said["num_rows"], said["num_tokens"]) == ("forward", 1, 4)
        assert "step" in said["call"]
        assert said["for_s"] >= 0.6
        assert "gate.wait" in said["stack"], "the line where it is"

        gate.open()
        await told(stream, READY, STUCK, READY)
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        await registry.becomes(ReplicaState.READY)
        await eventually(target.is_healthy, TIMEOUT_S)
        await stream.write(Frame(opens=[target_open(3)], rows=[row(3, 0, PROMPT)]))
        assert isinstance(await stream.answer(3), target_pb2.VerifyResult)
        assert registry.states[-1] is ReplicaState.READY


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
    """Measured at the start as 150 ms: more than `stuck_after_s`, and no reason to leave."""
    async with (
        tier(simulate="step_ms=150,vocab_size=256", stuck_after_s=0.1) as target,
        target.verify() as stream,
    ):
        await stream.write(Frame(opens=[target_open(1)]))
        for length in range(4, 9):
            await stream.write(Frame(rows=[row(1, 0, [7] * length)]))
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
                await asyncio.sleep(2 * progress.LOOK_INTERVAL_S)
                clock.now += 1_000
            assert status.state is ReplicaState.READY
            while status.state is ReplicaState.READY:
                await asyncio.sleep(progress.LOOK_INTERVAL_S)
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


async def test_stuck_for_too_long_ends_it(gate: Gate) -> None:
    """Not alive any more, as probes see while what is open has its grace."""
    settings = {"stuck_after_s": 0.6, "stuck_exit_s": 0.3, "stop_grace_s": 1.0}
    async with tier(**settings) as target, target.verify() as stream:
        stub = health_pb2_grpc.HealthStub(target.channel)
        alive = stub.Watch(health_pb2.HealthCheckRequest(service=LIVENESS))
        assert (await alive.read()).status == SERVING
        gate.shut()
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        async with asyncio.timeout(TIMEOUT_S):
            assert (await alive.read()).status == NOT_SERVING
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


SIMULATED = (
    "--simulate", "step_ms=1,vocab_size=256", "--port", "0", "--kv-cache-tokens", "4096"
)  # fmt: skip


@contextlib.asynccontextmanager
async def process_target(
    module: str, *words: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    """A target in a process of its own, and a stub of it."""
    async with program(module, *SIMULATED, *words) as process:
        assert process.stdout is not None
        async with asyncio.timeout(END_TIMEOUT_S):
            line = (await process.stdout.readline()).decode()
        assert line.startswith(LISTENING_PREFIX), line
        address = line.strip().removeprefix(LISTENING_PREFIX)
        async with grpc.aio.insecure_channel(address) as channel:
            yield process, target_pb2_grpc.TargetServiceStub(channel)


@pytest.mark.timeout(150)  # a process that imports torch, on a machine that may be busy
async def test_sigterm_drains_and_exits_with_0(redis_url: str) -> None:
    async with (
        registered(redis_url) as registry,
        process_target("target_service", "--redis-url", redis_url) as (process, stub),
        raw(stub.Verify()) as stream,
    ):
        await stream.write(Frame(opens=[target_open(1)], rows=[row(1, 0, PROMPT)]))
        await stream.answer(1)
        process.send_signal(signal.SIGTERM)
        await told(stream, READY, DRAINING)
        await stream.write(Frame(opens=[target_open(2)], rows=[row(1, 4, [5])]))
        assert (await stream.answer(2)).reason == target_pb2.RowError.REASON_DRAINING
        assert isinstance(await stream.answer(1), target_pb2.VerifyResult)
        await stream.write(Frame(closes=[target_pb2.TargetClose(generation_id=1)]))
        end = await ended(process)
        assert (end.status, end.said) == (0, []), end
        await registry.becomes(None)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("way", ["by itself", "by SIGTERM"])
async def test_a_process_ends_though_its_device_never_does(way: str) -> None:
    """Once stuck for too long, as a failure; or told to, cleanly."""
    exit_s = "0.5" if way == "by itself" else "300"
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
