"""Far more calls at once than fit: each is served, or rejected with a reason and a retry hint."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from outrider.v1 import orchestrator_pb2_grpc
from tests.stack import request
from tests.telemetry.parts import at_rest, services

NUM_CALLS = 2_000
ONE_TOKEN = {"temperature": 0, "ignore_eos": True, "max_tokens": 1}


async def _ended_as(client: orchestrator_pb2_grpc.OrchestratorServiceStub) -> str:
    """The name of its status; asserts that a rejection has a retry hint."""
    refused = None
    try:
        async for _ in client.Generate(request([1, 2, 3], ONE_TOKEN), timeout=200):
            pass
    except grpc.aio.AioRpcError as error:
        refused = error
    if refused is None:
        return "OK"
    status, hint = rpc_status.from_call(refused), error_details_pb2.RetryInfo()
    assert status is not None, refused
    assert [detail.Unpack(hint) for detail in status.details] == [True]
    assert hint.retry_delay.ToNanoseconds() > 0
    return str(refused.code().name)


@pytest.mark.slow
async def test_two_thousand_calls_at_once_are_all_answered_and_counted(redis_url: str) -> None:
    """gRPC drops none of them before the orchestrator gets it."""
    settings = {"max_generations": 8, "max_waiting": 8}
    async with services(redis_url, {"metrics_port": 0}, has_draft=False, **settings) as system:
        ended = Counter(await asyncio.gather(*(_ended_as(system.client) for _ in range(NUM_CALLS))))
        exposed = await at_rest(system.orchestrator)
    assert set(ended) == {"OK", "RESOURCE_EXHAUSTED"}
    assert exposed.counted("outrider_requests_total", "status") == ended
    refused = exposed.by("outrider_calls_refused_total", "reason")
    assert refused["queue_full"] == ended["RESOURCE_EXHAUSTED"]
