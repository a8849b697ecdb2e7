"""Lifecycle of a model service, for both tiers: listen, load, serve, drain, stop.

The replica is announced from listening to stopping, where there is a registry. A watchdog and the
failure policy run while it serves.
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
from outrider.model_server.load_engine import LoadedModel, load_served_engine
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
# Minimum time for which streams stay open while the replica drains. Orchestrators receive the new
# state, and a generation opened in the meantime is rejected with a reason.
NOTICE_S = 0.2
# Time for the running pass to end before the device thread is abandoned. Together with the default
# stop_grace_s (5) it is below the stop timeout of supervisors (`outrider up`: 10).
DEVICE_END_TIMEOUT_S = 3.0


class RunnableService(Protocol):
    """A mounted service: `prepare` is awaited before it serves, then `run` is its only task."""

    async def prepare(self, budget_s: float) -> None: ...

    @property
    def is_idle(self) -> bool: ...

    async def run(self) -> None: ...


@dataclass(frozen=True)
class MountedService:
    """A service and its engine. `statistics` and `costs` may be called on any thread."""

    service: RunnableService
    statistics: Callable[[], ServiceStatistics]
    costs: Callable[[], CostReport]
    health: PassHealth


# Builds the service for the loaded model and adds its servicer to the server.
Mount = Callable[
    [LoadedModel, DeviceThread, Server, ReplicaStatus, ReplicaTelemetry], MountedService
]


@contextlib.asynccontextmanager
async def model_serving(
    config: ModelServiceConfig, tier: str, service_name: str, mount: Mount
) -> AsyncIterator[Server]:
    """Serves a model for the time of a block.

    Listens at once and is healthy once the model is loaded. Drains and stops when the block is
    left. Raises ConfigError if the port is not available, ModelError if the model cannot be loaded,
    InternalError if the device was stuck or failing for too long; alone or in an ExceptionGroup.
    """
    protection = tier_protection(config, config.host)
    server = Server([service_name], protection)
    device = DeviceThread(service_name)
    status = ReplicaStatus()
    try:
        await server.start(config.host, config.port)
        announcement = Announcement(tier, advertised_address(config, server.port), status)
        async with (
            telemetry(tier, config.host, config) as exporters,
            announcement.announced(config.registries),
        ):
            meter = _meter(exporters, tier, status, protection)
            watch = ReplicaTelemetry(meter, exporters.tracing)
            server.metrics_port = exporters.exposition.port
            loaded = await device.run(load_served_engine, config)
            model, watched = loaded.model, WatchedEngine(loaded.engine, device)
            mounted = mount(loaded._replace(engine=watched), device, server, status, watch)
            announcement.loaded(model, mounted.statistics)
            if meter is not None:
                exporters.exposition.model_name = model.name
                meter.loaded(mounted.statistics, model.kv_capacity_tokens)
            await mounted.service.prepare(config.calibration_s)
            monitors = _monitors(config, device, status, mounted, watched)
            async with _running(service_name, server, mounted, announcement, status, monitors):
                status.serve()
                await server.set_serving(True)  # before the program prints where it listens
                _log_serving(server, model)
                try:
                    yield server
                finally:
                    await _stop(server, mounted.service, status, config.stop_grace_s)
    finally:
        await server.stop(0)
        if not await asyncio.to_thread(device.close, DEVICE_END_TIMEOUT_S):
            log.error("device_left_busy", stack=device.stack())


def _monitors(
    config: ModelServiceConfig,
    device: DeviceThread,
    status: ReplicaStatus,
    mounted: MountedService,
    engine: ServedEngine,
) -> tuple[Watchdog, Recovery]:
    watchdog = Watchdog(
        device,
        status,
        mounted.costs,
        stuck_after_s=config.stuck_after_s,
        exit_after_s=config.stuck_exit_s,
    )
    return watchdog, Recovery(device, status, mounted.health, partial(self_test, engine))


@contextlib.asynccontextmanager
async def _running(
    name: str,
    server: Server,
    mounted: MountedService,
    announcement: Announcement,
    status: ReplicaStatus,
    monitors: tuple[Watchdog, Recovery],
) -> AsyncIterator[None]:
    """Runs the service, the publishing of its state and its monitors for the time of a block."""
    watchdog, recovery = monitors
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(mounted.service.run(), name=name),
            tasks.create_task(_publish_state(server, announcement, status), name="state"),
            tasks.create_task(_watch_device(server, watchdog.run()), name="watchdog"),
            tasks.create_task(_watch_device(server, recovery.run()), name="recovery"),
        ]
        try:
            yield
        finally:
            for task in running:
                task.cancel()


def _meter(
    exporters: Telemetry, tier: str, status: ReplicaStatus, protection: ServerProtection
) -> ModelServerMetrics | None:
    if not exporters.is_metered:
        return None
    meter = ModelServerMetrics(tier, status)
    exporters.exposition.source = lambda: chain(meter.readings(), protection.readings())
    return meter


async def _publish_state(server: Server, announcement: Announcement, status: ReplicaStatus) -> None:
    """Publishes each state change to health and the registry."""
    while True:
        published = status.state
        announcement.renew()
        await server.set_serving(published is ReplicaState.READY)
        while status.state is published:
            await status.changed()


async def _watch_device(server: Server, monitor: Coroutine[None, None, None]) -> None:
    """Runs a device monitor; liveness is cleared at once when it gives the device up."""
    try:
        await monitor
    except InternalError:
        await server.set_alive(False)
        raise


async def _stop(
    server: Server, service: RunnableService, status: ReplicaStatus, grace_s: float
) -> None:
    """Drains: waits for open generations to end or move, at most `grace_s`."""
    status.drain()
    loop = asyncio.get_running_loop()
    notice_until = loop.time() + NOTICE_S

    def is_needed() -> bool:
        return not service.is_idle or (status.has_listeners and loop.time() < notice_until)

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
