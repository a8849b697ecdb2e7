"""Both halves of a bidirectional stream: what is to be sent, and the reading beside it.

Knows no message; lives on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


# Far more than an orchestrator's generations have under way together.
MAX_PENDING = 65_536


class Outbox(Generic[Item]):
    """What a stream still has to send: `put` never waits, the stream takes all that is pending.

    Bounded by its users: a generation has at most one request and one answer under way, and gives
    up a peer that does not answer. Who puts as much as a stranger asks for awaits `room` before.
    """

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._ready = asyncio.Event()
        self._taken = asyncio.Event()
        self._closed = False
        self._is_due = False

    def put(self, items: Iterable[Item]) -> None:
        self._items.extend(items)
        self._ready.set()

    async def room(self) -> None:
        """Returns when fewer than MAX_PENDING items are pending; one waiter."""
        while len(self._items) >= MAX_PENDING:
            self._taken.clear()
            await self._taken.wait()

    def beat(self) -> None:
        """The next batch comes at once, even if it is empty."""
        self._is_due = True
        self._ready.set()

    def close(self) -> None:
        """Ends `batches` once all is taken."""
        self._closed = True
        self._ready.set()

    async def batches(self) -> AsyncIterator[list[Item]]:
        """Everything pending, again and again; one consumer."""
        while True:
            await self._ready.wait()
            if not self._closed:  # once closed it stays ready: the end must not be slept through
                self._ready.clear()
            items, self._items = self._items, []
            is_due, self._is_due = self._is_due, False
            self._taken.set()
            if items or (is_due and not self._closed):
                yield items
            elif self._closed:
                return


class StreamCall(Generic[Item]):
    """The reading half of a bidirectional stream, beside the handler that writes.

    `read` gets each frame and may wait: the peer is then held by flow control. At the stream's end
    the outbox is closed, so that the writing half ends too. Raises on exit what `read` raised.
    """

    def __init__(
        self,
        frames: AsyncIterator[Item],
        read: Callable[[Item], Awaitable[None]],
        outbox: Outbox[Any],
    ) -> None:
        self._frames = frames
        self._read = read
        self._outbox = outbox

    async def _pump(self) -> None:
        frames = aiter(self._frames)
        try:
            async for frame in frames:
                await self._read(frame)
        finally:
            self._outbox.close()
            if isinstance(frames, AsyncGenerator):  # gRPC's, which else keeps the last frame
                await frames.aclose()

    async def __aenter__(self) -> None:
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._pump())

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        task, self._task = self._task, None
        assert task is not None, "it was entered"
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        try:
            if error is None and isinstance(result, Exception):
                raise result
        finally:  # else it would hold this frame, which holds it, and the frame that was refused
            del result, task
