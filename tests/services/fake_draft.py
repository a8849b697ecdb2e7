"""Fake draft replica: real gRPC, with answers made by the test. For drafts that misbehave."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from outrider.runtime.grpc_server import SERVER_OPTIONS
from outrider.v1 import draft_pb2, draft_pb2_grpc, model_pb2

# Answers to an open or a commit: proposals, or the end of the generation.
Answer = Callable[
    [draft_pb2.DraftOpen | draft_pb2.DraftCommit],
    Sequence[draft_pb2.Proposal | draft_pb2.DraftLost],
]


class FakeDraft(draft_pb2_grpc.DraftServiceServicer):
    """Serves `model`. Counts the opens and commits that it receives."""

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
            answers = [answer for item in items for answer in self._answer(item)]
            if answers:
                proposals = [each for each in answers if isinstance(each, draft_pb2.Proposal)]
                errors = [each for each in answers if isinstance(each, draft_pb2.DraftLost)]
                await context.write(draft_pb2.ProposeResponse(proposals=proposals, errors=errors))


@contextlib.asynccontextmanager
async def faking(fake: FakeDraft) -> AsyncIterator[str]:
    """Serves it; yields its address."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    draft_pb2_grpc.add_DraftServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
