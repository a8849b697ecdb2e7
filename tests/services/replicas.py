"""One simulated replica in this process, or in its own: its health, streams and registry record."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import draft_service.app
import target_service.app
from outrider.engine import Append
from outrider.engine.simulated import SimulatedEngine
from outrider.redis.registry import Replica, ReplicaState, Watcher
from outrider.runtime.grpc_server import Server
from outrider.runtime.main import LISTENING_PREFIX
from outrider.settings.services import ModelServiceConfig, TargetConfig
from outrider.settings.simulation import Simulation
from outrider.v1 import model_pb2, target_pb2, target_pb2_grpc
from tests.services.parts import STUCK_AFTER_S
from tests.services.programs import END_TIMEOUT_S, program
from tests.services.streams import Stream, raw
from tests.stack import eventually

TIMEOUT_S = 60.0
PROMPT = [3, 1, 4, 1]
Frame = target_pb2.VerifyRequest
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)
READY, DRAINING, STUCK, FAILING = (
    model_pb2.REPLICA_STATE_READY,
    model_pb2.REPLICA_STATE_DRAINING,
    model_pb2.REPLICA_STATE_STUCK,
    model_pb2.REPLICA_STATE_FAILING,
)
SETTINGS: dict[str, Any] = {
    "simulate": "step_ms=1,vocab_size=256",
    "port": 0,
    "kv_cache_tokens": 4096,
    "calibration_s": 0.0,
    "stuck_after_s": STUCK_AFTER_S,
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
        return int((await stub.Check(asked, timeout=TIMEOUT_S)).status)

    async def is_healthy(self) -> bool:
        return await self.health() == SERVING

    async def info(self) -> target_pb2.TargetServiceGetModelInfoResponse:
        asked = target_pb2.TargetServiceGetModelInfoRequest()
        info: target_pb2.TargetServiceGetModelInfoResponse = await self.stub().GetModelInfo(
            asked, timeout=TIMEOUT_S
        )
        return info

    def stub(self) -> Any:
        return target_pb2_grpc.TargetServiceStub(self.channel)

    def verify(self) -> Any:
        return raw(self.stub().Verify())

    async def has_ended(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.serving


@contextlib.asynccontextmanager
async def tier(
    kind: type[ModelServiceConfig] = TargetConfig, **settings: Any
) -> AsyncIterator[Tier]:
    """Ends with the block, if it has not before; what `serving` raises is its owner's."""
    config: Any = kind(**SETTINGS | settings)
    service: Any = target_service.app if kind is TargetConfig else draft_service.app
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
    """All registry records of a tier's only replica, in order."""

    records: list[Replica | None] = field(default_factory=list)

    def on_change(self, replicas: list[Replica]) -> None:
        assert len(replicas) <= 1
        self.records.append(replicas[0] if replicas else None)

    @property
    def states(self) -> list[ReplicaState | None]:
        """The states, without repetitions."""
        states = [replica.state if replica else None for replica in self.records]
        return [s for i, s in enumerate(states) if not i or s is not states[i - 1]]

    async def becomes(self, state: ReplicaState | None) -> Replica | None:
        async def has() -> bool:
            return bool(self.states) and self.states[-1] is state

        await eventually(has, TIMEOUT_S)
        return self.records[-1]


@contextlib.asynccontextmanager
async def registered(url: str, name: str = "target") -> AsyncIterator[Registered]:
    registry = Registered()
    watching = asyncio.create_task(Watcher(url, name, registry.on_change).run())
    try:
        yield registry
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def has_states(stream: Stream, *states: int) -> None:
    """Returns when exactly these states were received on the stream."""

    async def has() -> bool:
        return len(stream.states) >= len(states)

    await eventually(has, TIMEOUT_S)
    assert stream.states == list(states)


class Gate:
    """Blocks passes while it is shut."""

    def __init__(self) -> None:
        self._open, self._is_at_it = threading.Event(), threading.Event()
        self._open.set()
        self.open = self._open.set

    def shut(self) -> None:
        self._is_at_it.clear()
        self._open.clear()

    async def holds_a_pass(self) -> bool:
        return not self._open.is_set() and self._is_at_it.is_set()

    def engine(self, config: ModelServiceConfig) -> SimulatedEngine:
        gate, is_at_it = self._open, self._is_at_it

        class Gated(SimulatedEngine):
            def forward(self, appends: Sequence[Append]) -> None:
                is_at_it.set()
                assert gate.wait(2 * TIMEOUT_S)
                super().forward(appends)

        return Gated(Simulation.parse(config.simulate or ""), config.kv_cache_tokens)


class Fault:
    """Makes passes raise while it is on, or the next `num_to_fail`, like a broken device."""

    def __init__(self) -> None:
        self.is_on = False
        self.num_to_fail = 0
        self.num_failed = 0
        self.num_passes = 0

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's `forward`, with the fault. Called on the device thread."""

        def faulty(appends: Sequence[Append]) -> Any:
            self.num_passes += 1
            if self.is_on or self.num_to_fail > 0:
                self.num_to_fail -= 1
                self.num_failed += 1
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return forward(appends)

        return faulty

    def engine(self, config: ModelServiceConfig) -> SimulatedEngine:
        engine = SimulatedEngine(Simulation.parse(config.simulate or ""), config.kv_cache_tokens)
        engine.forward = self.around(engine.forward)  # type: ignore[method-assign]
        return engine


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
