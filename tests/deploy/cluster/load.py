"""Load: clients that call the Service `outrider` in a loop, and their results."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import grpc

from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc, sampling_pb2
from tests.deploy.cluster.control import Cluster

NUM_CLIENTS = 3
MAX_TOKENS = 48
# Pause between calls, so that starting pods get CPU time.
PAUSE_S = 0.2
PROMPTS = ("def fibonacci(n):", "import os\n", "class Stack:", "for i in range(")
TRAFFIC_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 120.0
# Generations that must succeed before and after each change.
NUM_CALM = 6


@dataclass(frozen=True)
class Failure:
    """A failed call: time, reason, and number of tokens received before."""

    at: float
    why: str
    num_tokens: int


@dataclass
class Load:
    """Results of all clients. `outputs`: distinct outputs per prompt; one, as they are greedy."""

    num_ended: int = 0
    num_tokens: int = 0
    num_accepted: int = 0
    failures: list[Failure] = field(default_factory=list)
    outputs: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    is_over: bool = False

    async def calm(self, num: int = NUM_CALM) -> None:
        """Returns after `num` more successful calls."""
        wanted = self.num_ended + num
        async with asyncio.timeout(TRAFFIC_TIMEOUT_S):
            while self.num_ended < wanted:  # noqa: ASYNC110 (counted by other tasks)
                await asyncio.sleep(0.05)


async def keep_calling(cluster: Cluster, load: Load) -> None:
    """One client; each call uses a random endpoint of the Service."""
    while not load.is_over:
        await asyncio.sleep(PAUSE_S)
        if cluster.endpoints("outrider"):  # without endpoints a Service accepts no connection
            await call(cluster, load, random.choice(PROMPTS), MAX_TOKENS)


async def call(cluster: Cluster, load: Load, prompt: str, max_tokens: int) -> None:
    """One call, recorded in `load`."""
    address = random.choice(cluster.endpoints("outrider"))
    request = orchestrator_pb2.GenerateRequest(
        text=prompt,
        sampling=sampling_pb2.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )
    token_ids: list[int] = []
    result = None
    try:
        async with grpc.aio.insecure_channel(f"{address}:50051") as channel:
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            async for chunk in stub.Generate(request, timeout=CALL_TIMEOUT_S):
                token_ids += chunk.token_ids
                result = chunk.result if chunk.HasField("result") else None
        why = f"ended early: {result}"
    except grpc.aio.AioRpcError as error:
        result, why = None, f"{error.code().name}: {error.details()}"
    if result is None or result.finish_reason != orchestrator_pb2.FINISH_REASON_LENGTH:
        load.failures.append(Failure(time.monotonic(), why, len(token_ids)))
        return
    load.num_ended += 1
    load.num_tokens += len(token_ids)
    load.num_accepted += result.speculation.num_accepted_tokens
    load.outputs.setdefault(f"{max_tokens} of {prompt}", set()).add(tuple(token_ids))
