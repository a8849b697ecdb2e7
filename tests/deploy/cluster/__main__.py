"""An overlay's pods under load, while a draft and a target pod are added and others removed.

The last line of standard output is the result, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from outrider.v1 import (
    draft_pb2,
    draft_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    sampling_pb2,
    target_pb2,
    target_pb2_grpc,
)
from tests.deploy.cluster.control import Cluster
from tests.deploy.cluster.kubelet import RunningPod
from tests.deploy.cluster.names import NameServer
from tests.deploy.cluster.sandbox import NODE_ADDRESS, Sandbox
from tests.deploy.manifests import Manifests

NUM_CALLERS = 3
MAX_TOKENS = 48
# Between a caller's calls: the cores are also for pods that start.
PAUSE_S = 0.2
PROMPTS = ("def fibonacci(n):", "import os\n", "class Stack:", "for i in range(")
# Two loads of torch at once on a machine that does other things too.
START_TIMEOUT_S = 240.0
TRAFFIC_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 120.0
# Generations that must go well before and after each change.
NUM_CALM = 6


@dataclass
class Load:
    """What callers saw. `outputs`: the different answers to each prompt; greedy, so one."""

    num_ended: int = 0
    num_tokens: int = 0
    num_accepted: int = 0
    failures: list[str] = field(default_factory=list)
    outputs: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    is_over: bool = False

    async def calm(self, num: int = NUM_CALM) -> None:
        """Returns after so many more."""
        wanted = self.num_ended + num
        async with asyncio.timeout(TRAFFIC_TIMEOUT_S):
            while self.num_ended < wanted:  # noqa: ASYNC110 (counted by other tasks)
                await asyncio.sleep(0.05)


async def call(cluster: Cluster, load: Load) -> None:
    """One caller, again and again, each time at one of the Service's endpoints."""
    while not load.is_over:
        await asyncio.sleep(PAUSE_S)
        prompt = random.choice(PROMPTS)
        if not (addresses := cluster.endpoints("outrider")):
            continue  # none is ready: a Service without endpoints takes no connection
        request = orchestrator_pb2.GenerateRequest(
            text=prompt,
            sampling=sampling_pb2.SamplingParams(
                temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True
            ),
        )
        token_ids: list[int] = []
        result = None
        try:
            async with grpc.aio.insecure_channel(f"{random.choice(addresses)}:50051") as channel:
                stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
                async for chunk in stub.Generate(request, timeout=CALL_TIMEOUT_S):
                    token_ids += chunk.token_ids
                    result = chunk.result if chunk.HasField("result") else None
        except grpc.aio.AioRpcError as error:
            load.failures.append(f"{error.code().name}: {error.details()}")
            continue
        if result is None or result.finish_reason != orchestrator_pb2.FINISH_REASON_LENGTH:
            load.failures.append(f"ended early: {result}")
            continue
        load.num_ended += 1
        load.num_tokens += len(token_ids)
        load.num_accepted += result.speculation.num_accepted_tokens
        load.outputs.setdefault(prompt, set()).add(tuple(token_ids))


async def num_opened(pod: RunningPod, component: str) -> int:
    """Generations that a replica has been given."""
    port = {"target": 50052, "draft": 50053}[component]
    async with grpc.aio.insecure_channel(f"{pod.address}:{port}") as channel:
        if component == "target":
            target = target_pb2_grpc.TargetServiceStub(channel)
            said: Any = await target.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest())
        else:
            draft = draft_pb2_grpc.DraftServiceStub(channel)
            said = await draft.GetModelInfo(draft_pb2.DraftServiceGetModelInfoRequest())
    return int(said.load.num_opened_total)


async def has_traffic(pod: RunningPod, component: str) -> int:
    """Returns when it has some."""
    async with asyncio.timeout(TRAFFIC_TIMEOUT_S):
        while not (num := await num_opened(pod, component)):  # noqa: ASYNC110 (another process's)
            await asyncio.sleep(0.2)
    return num


async def play(cluster: Cluster, load: Load) -> dict[str, Any]:
    """Up; one more of each tier; the two that were there first go; what is left goes on."""
    told: dict[str, Any] = {}
    begun = time.monotonic()
    cluster.apply()
    await cluster.ready(timeout_s=START_TIMEOUT_S)
    told["all_ready_s"] = time.monotonic() - begun
    first = [cluster.running(component)[0] for component in ("target", "draft")]
    async with asyncio.TaskGroup() as tasks:
        for _ in range(NUM_CALLERS):
            tasks.create_task(call(cluster, load))
        await load.calm()
        added = [cluster.add(component) for component in ("target", "draft")]
        await cluster.ready(*added, timeout_s=START_TIMEOUT_S)
        told["opened_at_added"] = [
            await has_traffic(pod, component)
            for pod, component in zip(added, ("target", "draft"), strict=True)
        ]
        await load.calm()
        await asyncio.gather(*(cluster.remove(pod) for pod in first))
        await load.calm()
        load.is_over = True
    told["removed"] = [
        {"name": pod.name, "stopped_in_s": pod.stopped_in_s, "exit_statuses": pod.exit_statuses,
         "grace_s": pod.grace_s}
        for pod in first
    ]  # fmt: skip
    told["num_restarts"] = {pod.name: pod.num_restarts for pod in cluster.pods + cluster.gone}
    return told


async def main(manifests: Manifests, sandbox: Sandbox, logs: Path) -> None:
    load = Load()
    async with asyncio.TaskGroup() as tasks:
        names = NameServer()
        await names.start(NODE_ADDRESS)
        cluster = Cluster(manifests, sandbox, names, logs, tasks)
        told = await play(cluster, load)
        for pod in cluster.pods:
            pod.kill()
    outputs = {prompt: len(found) for prompt, found in load.outputs.items()}
    print(json.dumps({**told, **asdict(load), "outputs": outputs}), flush=True)


if __name__ == "__main__":
    overlay, directory = Path(sys.argv[1]), Path(sys.argv[2])
    for name in ("mounts", "logs"):
        (directory / name).mkdir()
    made = Sandbox(directory / "mounts")
    made.prepare()
    asyncio.run(main(Manifests.parse(overlay.read_text("utf-8")), made, directory / "logs"))
