"""The life of a model service, for both tiers: listen, load, serve, drain, stop.

Announced all the while, where there is a registry; watched while it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import structlog

from outrider.engine import DeviceThread, ServedEngine
from outrider.errors import InternalError
from outrider.model_server.announcement import Announcement, advertised_address
from outrider.model_server.failure_policy import PassHealth, Recovery, self_test
from outrider.model_server.load_engine import load_served_engine
from outrider.model_server.messages import ServiceStatistics
from outrider.model_server.metrics import ModelServerMetrics
from outrider.model_server.replica_status import ReplicaStatus
from outrider.model_server.stream_telemetry import ReplicaTelemetry
from outrider.model_server.watchdog import Watchdog, WatchedEngine
from outrider.replica import CostReport, ReplicaState
from outrider.runtime.grpc_server import Server
from outrider.runtime.server_security import ServerProtection, tier_protection
from outrider.settings.services import ModelServiceConfig
from outrider.telemetry.telemetry import Telemetry, telemetry
from outrider.v1 import model_pb2

log = structlog.get_logger()

STOP_POLL_S = 0.05
# Streams stay so long at least when the replica drains: who opens something just then is refused
# by name, and those who listen have heard.
TELLING_S = 0.2
# A pass under way may end before the thread is left to itself. With the default stop_grace_s (5)
# less than supervisors wait (`outrider up`: 10).
DEVICE_END_TIMEOUT_S = 3.0


class RunnableService(Protocol):
    """A mounted service: `prepare` before it serves, then `run` is its only task."""

    async def prepare(self, budget_s: float) -> None: ...

    @property
    def is_idle(self) -> bool: ...

    async def run(self) -> None: ...


@dataclass(frozen=True)
class MountedService:
    """A service around an engine. `statistics` and `costs` may be called on any thread."""

    service: RunnableService
    statistics: Callable[[], ServiceStatistics]
    costs: Callable[[], CostReport]
    health: PassHealth


# Builds the service around the loaded engine and adds its servicer to the server.
Mount = Callable[
    [ServedEngine, model_pb2.ModelInfo, DeviceThread, Server, ReplicaStatus, ReplicaTelemetry],
    MountedService,
]


@contextlib.asynccontextmanager
async def model_serving(
    config: ModelServiceConfig, tier: str, service_name: str, mount: Mount
) -> AsyncIterator[Server]:
    """Listens at once, serves (health) when the model is loaded; drains and stops on leaving.

    Raises ConfigError if the port cannot be had, ModelError if the model cannot be loaded,
    InternalError where the device was stuck or failed for too long; alone or in an ExceptionGroup.
    """
    protection = tier_protection(config, config.host)
    server = Server([service_name], protection)
    device = DeviceThread(service_name)
    status = ReplicaStatus()
    try:
        await server.start(config.host, config.port)
        card = Announcement(tier, advertised_address(config, server.port), status)
        async with telemetry(tier, config.host, config) as told, card.announced(config.redis):
            watch = ReplicaTelemetry(_meter(told, tier, status, protection), told.tracing)
            server.metrics_port = told.exposition.port
            engine, model = await device.run(load_served_engine, config)
            watched = WatchedEngine(engine, device)
            mounted = mount(watched, model, device, server, status, watch)
            card.loaded(model, mounted.statistics)
            if watch.meter is not None:
                told.exposition.model_name = model.name
                watch.meter.loaded(mounted.statistics, model.kv_capacity_tokens)
            await mounted.service.prepare(config.calibration_s)
            watchdog = Watchdog(
                device,
                status,
                mounted.costs,
                stuck_after_s=config.stuck_after_s,
                exit_after_s=config.stuck_exit_s,
            )
            recovery = Recovery(device, status, mounted.health, partial(self_test, watched))
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(mounted.service.run(), name=service_name),
                    tasks.create_task(_tell(server, card, status), name="state"),
                    tasks.create_task(_alive(server, watchdog.run()), name="watchdog"),
                    tasks.create_task(_alive(server, recovery.run()), name="recovery"),
                ]
                status.serve()
                await server.set_serving(True)  # before anybody is told where it listens
                _log_serving(server, model)
                try:
                    yield server
                finally:
                    await _stop(server, mounted.service, status, config.stop_grace_s)
                    for task in running:
                        task.cancel()
    finally:
        await server.stop(0)
        if not await asyncio.to_thread(device.close, DEVICE_END_TIMEOUT_S):
            log.error("device_left_busy", stack=device.stack())


def _meter(
    told: Telemetry, tier: str, status: ReplicaStatus, protection: ServerProtection
) -> ModelServerMetrics | None:
    if not told.is_metered:
        return None
    meter = ModelServerMetrics(tier, status)
    told.exposition.source = lambda: chain(meter.readings(), protection.readings())
    return meter


async def _tell(server: Server, card: Announcement, status: ReplicaStatus) -> None:
    """Keeps health and registry at what the replica is."""
    while True:
        told = status.state
        card.renew()
        await server.set_serving(told is ReplicaState.READY)
        while status.state is told:
            await status.change()


async def _alive(server: Server, watching: Coroutine[None, None, None]) -> None:
    """Where what watches the device gives it up, probes are told at once."""
    try:
        await watching
    except InternalError:
        await server.set_alive(False)
        raise


async def _stop(
    server: Server, service: RunnableService, status: ReplicaStatus, grace_s: float
) -> None:
    """Open generations may end or be moved; without any there is no need for grace."""
    status.drain()
    loop = asyncio.get_running_loop()
    told_at = loop.time() + TELLING_S

    def is_needed() -> bool:
        return not service.is_idle or (status.has_followers and loop.time() < told_at)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            while is_needed():  # noqa: ASYNC110 (changes on the device thread)
                await asyncio.sleep(STOP_POLL_S)
    await server.stop(0)


def _log_serving(server: Server, model: model_pb2.ModelInfo) -> None:
    log.info(
        "serving",
        port=server.port,
        model=model.name,
        num_parameters=model.num_parameters,
        dtype=model.dtype,
        device=model.device,
        kv_capacity_tokens=model.kv_capacity_tokens,
    )
