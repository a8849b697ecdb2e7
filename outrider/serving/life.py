"""The life of a model service, for both tiers: listen, load, serve, stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import structlog

from outrider.config import ModelServiceConfig
from outrider.engine import DeviceThread, ServedEngine
from outrider.server import Server
from outrider.serving.loading import load_served_engine
from outrider.v1 import model_pb2

log = structlog.get_logger()

STOP_GRACE_S = 5.0
STOP_POLL_S = 0.05


class Running(Protocol):
    """A mounted service: `prepare` before it serves, then `run` is its only task."""

    async def prepare(self, budget_s: float) -> None: ...

    @property
    def is_idle(self) -> bool: ...

    async def run(self) -> None: ...


# Builds the service around the loaded engine and adds its servicer to the server.
Mount = Callable[[ServedEngine, model_pb2.ModelInfo, DeviceThread, Server], Running]


async def _stop(server: Server, service: Running) -> None:
    """Open generations may end; streams without any need no grace."""
    await server.set_serving(False)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_GRACE_S):
            while not service.is_idle:  # noqa: ASYNC110 (changes on the device thread)
                await asyncio.sleep(STOP_POLL_S)
    await server.stop(0)


@contextlib.asynccontextmanager
async def model_serving(
    config: ModelServiceConfig, service_name: str, mount: Mount
) -> AsyncIterator[Server]:
    """Listens at once, serves (health) when the model is loaded; stops on leaving.

    Raises ConfigError if the port cannot be had, ModelError if the model cannot be loaded; what the
    service's own task raises comes in an ExceptionGroup.
    """
    server = Server([service_name])
    device = DeviceThread(service_name)
    try:
        await server.start(config.host, config.port)
        engine, model = await device.run(load_served_engine, config)
        service = mount(engine, model, device, server)
        await service.prepare(config.calibration_s)
        async with asyncio.TaskGroup() as tasks:
            stepping = tasks.create_task(service.run(), name=service_name)
            await server.set_serving(True)
            log.info(
                "serving",
                port=server.port,
                model=model.name,
                num_parameters=model.num_parameters,
                dtype=model.dtype,
                device=model.device,
                kv_capacity_tokens=model.kv_capacity_tokens,
            )
            try:
                yield server
            finally:
                await _stop(server, service)
                stepping.cancel()
    finally:
        await server.stop(0)
        device.close()
