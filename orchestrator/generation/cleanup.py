"""Ends of calls: what frees a call's lease when the call itself is cancelled, awaited at the stop.

Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import structlog

log = structlog.get_logger()

# What is cancelled needs no more than some turns of the event loop.
_CANCEL_WAIT_S = 1.0


class Cleanup:
    """Calls under way, and what they leave behind: a cancelled call's lease is still given back."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.contextmanager
    def of_call(self) -> Iterator[None]:
        """For the time of a call, in its task: until it has ended it may leave something behind."""
        task = asyncio.current_task()
        assert task is not None, "a call is a task"
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def shielded(self, work: Coroutine[Any, Any, None]) -> None:
        """Does it to its end, also where the caller is cancelled meanwhile."""
        await asyncio.shield(self.behind(work))

    def behind(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Does it after the call has ended. It must be bounded, and raise nothing."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def done(self, timeout_s: float) -> None:
        """Waits for all of it; what takes longer than that is cancelled."""
        give_up_at = time.monotonic() + timeout_s
        while self._tasks and (left_s := give_up_at - time.monotonic()) > 0:
            await asyncio.wait(self._tasks, timeout=left_s)
        if not self._tasks:
            return
        log.warning("calls_not_ended", num=len(self._tasks), waited_s=timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=_CANCEL_WAIT_S)
