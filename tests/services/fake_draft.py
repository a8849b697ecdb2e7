"""A draft replica that misbehaves: the real contract over real gRPC, proposals made in the test."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from outrider.runtime.grpc_server import SERVER_OPTIONS
from outrider.v1 import draft_pb2, draft_pb2_grpc, model_pb2

# What is said to an open or a commit: proposals, or nothing.
Answer = Callable[[draft_pb2.DraftOpen | draft_pb2.DraftCommit], list[draft_pb2.Proposal]]


class FakeDraft(draft_pb2_grpc.DraftServiceServicer):
    """Says of itself what the target says; `num_opens` counts what it was asked."""

    def __init__(self, model: model_pb2.ModelInfo, answer: Answer) -> None:
        self._model = model
        self._answer = answer
        self.num_opens = 0
        self.num_commits = 0

    async def GetModelInfo(
        self, request: Any, context: Any
    ) -> draft_pb2.DraftServiceGetModelInfoResponse:
        return draft_pb2.DraftServiceGetModelInfoResponse(model=self._model)

    async def Propose(
        self, request_iterator: AsyncIterator[draft_pb2.ProposeRequest], context: Any
    ) -> None:
        async for frame in request_iterator:
            self.num_opens += len(frame.opens)
            self.num_commits += len(frame.commits)
            items = [*frame.opens, *frame.commits]
            proposals = [proposal for item in items for proposal in self._answer(item)]
            if proposals:
                await context.write(draft_pb2.ProposeResponse(proposals=proposals))


@contextlib.asynccontextmanager
async def faking(fake: FakeDraft) -> AsyncIterator[str]:
    """host:port of it."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    draft_pb2_grpc.add_DraftServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
