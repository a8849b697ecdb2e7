"""One orchestrator's stream at a model service: frames in, results out, and what it leaves behind.

Knows neither tier's messages: subclasses read the frames. Lives on the event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc

from outrider.rpc import translated
from outrider.serving.scheduler import GenerationKey, Keyed, Scheduler
from outrider.streams import Outbox, StreamCall

Command = TypeVar("Command")
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
) -> None:
    """Reads and writes independently: reading a frame never waits for a step.

    `close` makes the command that frees a generation, for those open when the stream ends.
    """

    async def read(frame: Frame) -> None:
        await scheduler.submit(peer.commands(frame))

    scheduler.attach(peer.id, peer)
    try:
        async with translated(context), StreamCall(frames, read, peer.outbox):
            async for results in peer.outbox.batches():
                await context.write(to_frame(results))
    finally:
        scheduler.detach(peer.id, [close(key) for key in peer.open_keys])
