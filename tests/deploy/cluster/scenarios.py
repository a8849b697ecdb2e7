"""Scenarios: changes to an overlay's pods under load.

Each takes a cluster that is not started yet and returns its observations.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from outrider.v1 import draft_pb2, draft_pb2_grpc, target_pb2, target_pb2_grpc
from tests.deploy.cluster.control import Cluster
from tests.deploy.cluster.kubelet import RunningPod
from tests.deploy.cluster.load import NUM_CLIENTS, TRAFFIC_TIMEOUT_S, Load, call, keep_calling

# Enough for two starts of torch at the same time on a busy machine.
START_TIMEOUT_S = 240.0
# Long enough to be running when the primary is lost and until another is elected.
LONG_PROMPT, LONG_TOKENS = "import sys\n", 1_500
# A sentinel asks the primary for its replicas at this interval.
SENTINEL_ASKS_S = 10.0


async def num_opened(pod: RunningPod, component: str) -> int:
    """Generations opened at a replica."""
    port = {"target": 50052, "draft": 50053}[component]
    async with grpc.aio.insecure_channel(f"{pod.address}:{port}") as channel:
        if component == "target":
            target = target_pb2_grpc.TargetServiceStub(channel)
            response: Any = await target.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest())
        else:
            draft = draft_pb2_grpc.DraftServiceStub(channel)
            response = await draft.GetModelInfo(draft_pb2.DraftServiceGetModelInfoRequest())
    return int(response.load.num_opened_total)


async def has_traffic(pod: RunningPod, component: str) -> int:
    """Waits until a replica has opened generations; returns their number."""
    async with asyncio.timeout(TRAFFIC_TIMEOUT_S):
        while not (num := await num_opened(pod, component)):  # noqa: ASYNC110 (another process's)
            await asyncio.sleep(0.2)
    return num


async def grow_and_shrink(cluster: Cluster, load: Load) -> dict[str, Any]:
    """Starts all, adds a replica per tier, removes the two first ones."""
    result: dict[str, Any] = {"all_ready_s": await _all_ready_s(cluster)}
    first = [cluster.running(component)[0] for component in ("target", "draft")]
    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_CLIENTS):
            tasks.create_task(keep_calling(cluster, load))
        await load.calm()
        added = [cluster.add(component) for component in ("target", "draft")]
        await cluster.ready(*added, timeout_s=START_TIMEOUT_S)
        result["opened_at_added"] = [
            await has_traffic(pod, component)
            for pod, component in zip(added, ("target", "draft"), strict=True)
        ]
        await load.calm()
        await asyncio.gather(*(cluster.remove(pod) for pod in first))
        await load.calm()
        load.is_over = True
    result["removed"] = [
        {"name": pod.name, "stopped_in_s": pod.stopped_in_s, "exit_statuses": pod.exit_statuses,
         "grace_s": pod.grace_s}
        for pod in first
    ]  # fmt: skip
    return result


async def lose_redis(cluster: Cluster, load: Load) -> dict[str, Any]:
    """Starts all, kills the primary Redis and its sentinel, waits for another primary."""
    result: dict[str, Any] = {"all_ready_s": await _all_ready_s(cluster)}
    primary = next(pod for pod in cluster.pods if pod.name == "outrider-redis-0")
    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_CLIENTS):
            tasks.create_task(keep_calling(cluster, load))
        await load.calm()
        await asyncio.sleep(1.5 * SENTINEL_ASKS_S)
        running = tasks.create_task(call(cluster, load, LONG_PROMPT, LONG_TOKENS))
        await load.calm(1)
        assert not running.done(), "the long generation is running at the loss"
        result["lost_at"] = time.monotonic()
        primary.kill()
        await cluster.remove(primary)
        await running
        await load.calm()
        load.is_over = True
    return result


async def _all_ready_s(cluster: Cluster) -> float:
    begun = time.monotonic()
    cluster.apply()
    await cluster.ready(timeout_s=START_TIMEOUT_S)
    return time.monotonic() - begun


SCENARIOS = {scenario.__name__: scenario for scenario in (grow_and_shrink, lose_redis)}
