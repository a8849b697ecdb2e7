"""A link ends when its task is cancelled, whatever else fails at that moment."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from orchestrator.replicas.target_client import TargetLink
from tests.orchestrator.replicas.test_replica_stream import any_model


class Breaking(TargetLink):
    """Its stream breaks during the cancellation, so that the error replaces it."""

    async def _connect(self) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing)


@pytest.mark.timeout(30)
async def test_a_stream_that_breaks_during_the_cancellation() -> None:
    """A process survived its SIGTERM when tiers, Redis and parent died at the same time."""
    link = Breaking("127.0.0.1:1", any_model, lambda: None)
    running = asyncio.create_task(link.run())
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
