"""Cleanup of requests: work that must finish although the request was cancelled.

For use on the event loop only. The orchestrator waits for it before it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import structlog

log = structlog.get_logger()

# A cancelled task needs no more than a few turns of the event loop.
_CANCEL_WAIT_S = 1.0


class Cleanup:
    """Set of running requests and of their cleanup work, such as the release of a lease."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Tracks the current task, which runs a request, until the block ends."""
        task = asyncio.current_task()
        assert task is not None, "a request runs in a task"
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def shielded(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` to its end even if the awaiting task is cancelled."""
        await asyncio.shield(self.in_background(work))

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `work` after the request has ended. It must be bounded and raise nothing."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self, timeout_s: float) -> None:
        """Waits for all tracked tasks; after `timeout_s` cancels those that still run."""
        give_up_at = time.monotonic() + timeout_s
        while self._tasks and (left_s := give_up_at - time.monotonic()) > 0:
            await asyncio.wait(self._tasks, timeout=left_s)
        if not self._tasks:
            return
        log.warning("requests_not_ended", num=len(self._tasks), waited_s=timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=_CANCEL_WAIT_S)
