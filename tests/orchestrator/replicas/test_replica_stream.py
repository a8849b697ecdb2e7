"""A cancelled link ends, whatever the state of its stream."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from outrider.runtime.grpc_server import SERVER_OPTIONS
from outrider.v1 import draft_pb2, draft_pb2_grpc


async def any_model(model: Any, token_hashes: Any) -> None:
    """Every model fits."""


class _Breaking(draft_pb2_grpc.DraftServiceServicer):
    """Ends every stream with an error once `breaks` is set."""

    def __init__(self) -> None:
        self.breaks = asyncio.Event()

    async def GetModelInfo(
        self, request: Any, context: Any
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        return draft_pb2.DraftServiceGetModelInfoResponse()

    async def Propose(self, request_iterator: Any, context: Any) -> None:
        await self.breaks.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the replica ends")


class _WatchedLink(DraftLink):
    """Sets `broke` in the turn of the event loop in which its stream breaks."""

    broke: asyncio.Event

    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        self.broke = asyncio.Event()
        call = super()._open_stream(channel)
        call.add_done_callback(lambda _: self.broke.set())
        return call


@pytest.mark.parametrize("num_turns", range(8))
async def test_a_link_ends_when_its_stream_breaks_at_the_same_moment(num_turns: int) -> None:
    """A link that was cancelled while it awaited the sender of a broken stream used to reconnect.

    An orchestrator that was stopped at the moment when its drafts died then never ended.
    """
    breaking = _Breaking()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    draft_pb2_grpc.add_DraftServiceServicer_to_server(breaking, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    links: list[_WatchedLink] = []

    def make_link(endpoint: str, on_change: Any) -> _WatchedLink:
        links.append(_WatchedLink(endpoint, any_model, on_change))
        return links[-1]

    try:
        async with asyncio.timeout(100):
            pool = ReplicaPool("draft", make_link, [f"127.0.0.1:{port}"])
            async with pool.running():
                await pool.settled()
                breaking.breaks.set()
                await links[0].broke.wait()
                for _ in range(num_turns):
                    await asyncio.sleep(0)
    finally:
        await server.stop(0)
