"""The replicas that the registry names, offered to the pools. Chooses nothing, checks nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from orchestrator.replicas.pool import ReplicaPool
from outrider.redis.registry import Replica, Watcher
from outrider.settings.redis_address import RedisAddress


@contextlib.asynccontextmanager
async def discovering(
    redis: RedisAddress, pools: Sequence[ReplicaPool[Any] | None]
) -> AsyncIterator[None]:
    """For the time of a block, for those pools that have no list of their own."""
    async with asyncio.TaskGroup() as tasks:
        watching = [
            tasks.create_task(_watcher(redis, pool).run(), name=f"{pool.tier} registry")
            for pool in pools
            if pool is not None and pool.is_discovered
        ]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()


def _watcher(redis: RedisAddress, pool: ReplicaPool[Any]) -> Watcher:
    def offer(replicas: list[Replica]) -> None:
        pool.offer({replica.address: replica.num_open_generations for replica in replicas})

    return Watcher(redis, pool.tier, offer)
