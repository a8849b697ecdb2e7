"""The one thread that owns the device: whatever touches an engine runs on it, in order.

Knows nothing about models. The event loop only awaits; it never computes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from outrider.errors import InternalError

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


class DeviceThread:
    """Runs calls one after another on a thread of its own."""

    def __init__(self, name: str = "device") -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._closed = False

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`fn(*args, **kwargs)`, computed on the thread; calls run in the order they were made.

        If the awaiting task is cancelled the call still runs to its end, and an exception it
        raises is logged. Raises what `fn` raises, or InternalError after `close`.
        """
        if self._closed:
            raise InternalError("the device thread is closed")
        work = self._executor.submit(fn, *args, **kwargs)
        # asyncio.wrap_future would cancel work that has not begun, and asyncio.shield would
        # mark the exception of abandoned work as seen: both lose what must not be lost.
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()
        work.add_done_callback(lambda _: _wake(loop, finished))
        try:
            await finished
        except asyncio.CancelledError:
            work.add_done_callback(_log_abandoned)
            raise
        return work.result()

    def close(self) -> None:
        """Finishes the calls already made, then ends the thread. May be called twice."""
        self._closed = True
        self._executor.shutdown(wait=True)


def _wake(loop: asyncio.AbstractEventLoop, finished: asyncio.Future[None]) -> None:
    def resolve() -> None:
        if not finished.done():
            finished.set_result(None)

    # A loop that closed while the work ran has nobody left to tell.
    if not loop.is_closed():
        try:
            loop.call_soon_threadsafe(resolve)
        except RuntimeError:
            _log.debug("the event loop closed while device work was finishing")


def _log_abandoned(work: Future[T]) -> None:
    error = work.exception()
    if error is not None:
        _log.error("work on the device failed after its caller was cancelled", exc_info=error)
