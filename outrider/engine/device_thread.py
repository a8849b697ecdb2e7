"""The one thread that owns the device: whatever touches an engine runs on it, in order.

Says what it is at, for whoever watches that it moves. Knows nothing about models. The event loop
only awaits; it never computes.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, ParamSpec, TypeVar

from outrider.errors import InternalError

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

# Of the thread's stack: from where it is outward to the service's own frames.
_MAX_STACK_FRAMES = 16


class Activity(NamedTuple):
    """What the thread is at. `part` of the call; a pass has `num_rows` sequences.

    `since`: seconds of the monotonic clock. Each is an object of its own, so that whoever sees the
    same one again knows that nothing has moved.
    """

    call: str
    part: str
    since: float
    num_rows: int = 0
    num_tokens: int = 0


class DeviceThread:
    """Runs calls one after another on a thread of its own.

    The thread is a daemon: one that never comes back must not keep the process from ending.
    """

    def __init__(self, name: str = "device") -> None:
        # Bounded by the callers, each of whom awaits its call.
        self._calls: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        # None: idle. Written on the thread, may be read on any.
        self.activity: Activity | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`fn(*args, **kwargs)`, computed on the thread; calls run in the order they were made.

        If the awaiting task is cancelled the call still runs to its end, and an exception it
        raises is logged. Raises what `fn` raises, or InternalError after `close`.
        """
        work: Future[T] = Future()

        def call() -> None:
            try:
                work.set_result(fn(*args, **kwargs))
            except BaseException as error:
                work.set_exception(error)

        # asyncio.wrap_future would cancel work that has not begun, and asyncio.shield would
        # mark the exception of abandoned work as seen: both lose what must not be lost.
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()
        work.add_done_callback(lambda _: _wake(loop, finished))
        with self._closing:  # whatever is queued is queued before the end
            if self._closed:
                raise InternalError("the device thread is closed")
            self._calls.put((getattr(fn, "__qualname__", type(fn).__qualname__), call))
        try:
            await finished
        except asyncio.CancelledError:
            work.add_done_callback(_log_abandoned)
            raise
        return work.result()

    def note(self, part: str, num_rows: int, num_tokens: int) -> None:
        """The call under way goes on to another part; called on the thread, by that call."""
        call = self.activity.call if self.activity else part
        self.activity = Activity(call, part, time.monotonic(), num_rows, num_tokens)

    def stack(self) -> str:
        """Where the thread is now, innermost frame last; on any thread."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame, _MAX_STACK_FRAMES)) if frame else ""

    def close(self, timeout_s: float | None = None) -> bool:
        """Finishes the calls already made, then ends the thread. May be called twice.

        Blocks for `timeout_s` at most (None: as long as it takes); False where that was too short.
        """
        with self._closing:
            if not self._closed:
                self._closed = True
                self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            name, call = item
            self.activity = Activity(name, name, time.monotonic())
            call()
            self.activity = None
            del item, call  # with their arguments and results, which may be large


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
