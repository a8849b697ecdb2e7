"""The two halves of a bidirectional stream: an outbox to send from, and a reader task.

Independent of message types. For use on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


# Far more than an orchestrator's generations have in flight together.
MAX_PENDING = 65_536


class Outbox(Generic[Item]):
    """Queue of items to send: `put` never waits, and a batch contains everything pending.

    Its users bound its size: a generation has at most one request and one answer in flight, and
    leaves a peer that does not answer. A sender whose peer decides how much to send awaits `room`
    first.
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
        """Waits until fewer than MAX_PENDING items are pending. Only one task may wait."""
        while len(self._items) >= MAX_PENDING:
            self._taken.clear()
            await self._taken.wait()

    def beat(self) -> None:
        """Makes the next batch come at once, even if it is empty."""
        self._is_due = True
        self._ready.set()

    def close(self) -> None:
        """Ends `batches` once all items are taken."""
        self._closed = True
        self._ready.set()

    async def batches(self) -> AsyncIterator[list[Item]]:
        """Yields everything pending, repeatedly. Only one task may iterate."""
        while True:
            await self._ready.wait()
            if not self._closed:  # stays set after `close`, so that the end is noticed
                self._ready.clear()
            items, self._items = self._items, []
            is_due, self._is_due = self._is_due, False
            self._taken.set()
            if items or (is_due and not self._closed):
                yield items
            elif self._closed:
                return


class StreamCall(Generic[Item]):
    """Reads a bidirectional stream in a task, while the handler writes.

    `read` gets each frame and may wait; flow control then stops the peer. At the end of the stream
    the outbox is closed, which ends the writing half, too. Leaving the block raises the
    exception that `read` raised.
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
            if isinstance(frames, AsyncGenerator):  # otherwise gRPC's keeps the last frame
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
        finally:  # breaks a reference cycle that would keep the rejected frame in memory
            del result, task
