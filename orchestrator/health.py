"""Health of the orchestrator: whether a target is connected, and whether Redis accepts writes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetLink
from orchestrator.sessions import SessionStore
from outrider.runtime.grpc_server import REDIS, Server

# Interval of checks whether Redis accepts writes.
REDIS_CHECK_S = 1.0


@contextlib.asynccontextmanager
async def updating_health(targets: ReplicaPool[TargetLink], server: Server) -> AsyncIterator[None]:
    """Health is SERVING while a target is connected, for the block. Drafts are not needed."""

    async def update() -> None:
        while True:
            is_served = targets.has_any
            await server.set_serving(is_served)
            while targets.has_any == is_served:
                await targets.change()

    async with asyncio.TaskGroup() as tasks:
        updating = tasks.create_task(update(), name="health")
        try:
            yield
        finally:
            updating.cancel()


@contextlib.asynccontextmanager
async def checking_redis(store: SessionStore, server: Server) -> AsyncIterator[None]:
    """Keeps the health name `redis` and the metric up to date for the block, even without requests.

    Readiness does not depend on Redis: all orchestrators share it, and all would become unready.
    """

    async def check() -> None:
        while True:
            await server.set_health(REDIS, await store.takes_writes())
            await asyncio.sleep(REDIS_CHECK_S)

    await server.set_health(REDIS, not store.is_away)
    async with asyncio.TaskGroup() as tasks:
        checking = tasks.create_task(check(), name="redis health")
        try:
            yield
        finally:
            checking.cancel()
