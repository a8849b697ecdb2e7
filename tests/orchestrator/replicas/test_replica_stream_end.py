"""A link ends when its task is cancelled, whatever else happens to it at that moment."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from orchestrator.replicas.target_client import TargetLink
from tests.orchestrator.replicas.test_replica_stream import any_model


class Breaking(TargetLink):
    """Its stream breaks while it is being left: the error takes the cancellation's place."""

    async def _connect(self) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing)


@pytest.mark.timeout(30)
async def test_a_stream_that_breaks_as_it_is_left() -> None:
    """Once a process outlived its SIGTERM: tiers, Redis and parent had died at the same time."""
    link = Breaking("127.0.0.1:1", any_model, lambda: None)
    running = asyncio.create_task(link.run())
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
