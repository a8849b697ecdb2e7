"""One orchestrator's stream at a model service: frames in, results out, and what it leaves behind.

Knows neither tier's messages: subclasses read the frames. Lives on the event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc

from outrider.costs import CostReport
from outrider.rpc import translated
from outrider.serving.scheduler import GenerationKey, Keyed, Scheduler
from outrider.streams import Outbox, StreamCall
from outrider.wire import costs_to_proto

Command = TypeVar("Command", bound=Keyed)
Result = TypeVar("Result", bound=Keyed)
Frame = Any


class StreamPeer(ABC, Generic[Command, Result]):
    """`open_keys` are the generations to close when the stream ends."""

    def __init__(self, peer_id: int) -> None:
        self.id = peer_id
        self.outbox: Outbox[Result] = Outbox()
        self.open_keys: set[GenerationKey] = set()

    def deliver(self, results: Sequence[Result]) -> None:
        self.outbox.put(results)

    @abstractmethod
    def commands(self, frame: Frame) -> list[Command]:
        """The frame's commands in order; what cannot be read fails its generation alone."""


async def serve_stream(
    scheduler: Scheduler[Command, Result],
    peer: StreamPeer[Command, Result],
    frames: AsyncIterator[Frame],
    context: grpc.aio.ServicerContext[Any, Any],
    to_frame: Callable[[Sequence[Result]], Frame],
    close: Callable[[GenerationKey], Command],
    costs: Callable[[], CostReport],
) -> None:
    """Reads and writes independently: reading a frame never waits for a step.

    `close` makes the command that frees a generation, for those open when the stream ends; `costs`
    are told with the frame after each change.
    """

    async def read(frame: Frame) -> None:
        await scheduler.submit(peer.commands(frame))

    scheduler.attach(peer.id, peer)
    told = costs()  # with the model's description, before the stream
    try:
        async with translated(context), StreamCall(frames, read, peer.outbox):
            async for results in peer.outbox.batches():
                frame = to_frame(results)
                if (report := costs()) is not told:
                    told = report
                    frame.costs.CopyFrom(costs_to_proto(report))
                await context.write(frame)
    finally:
        scheduler.detach(peer.id, [close(key) for key in peer.open_keys])
