"""Device thread: the one thread that runs all calls of an engine, in order.

It publishes its current activity for the watchdog (`outrider/model_server/watchdog.py`). The event
loop only awaits results; it never computes.
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

# Stack frames reported, from the innermost outward to the service's own code.
_MAX_STACK_FRAMES = 16


class Activity(NamedTuple):
    """Current activity of the thread: `part` of `call`; a forward pass has `num_rows` sequences.

    `since`: seconds of the monotonic clock. Every activity is a new object, so a watchdog that sees
    the same object again knows that the thread has made no progress.
    """

    call: str
    part: str
    since: float
    num_rows: int = 0
    num_tokens: int = 0


class DeviceThread:
    """Runs calls one after another on its own thread.

    The thread is a daemon: a call that never returns must not keep the process alive.
    """

    def __init__(self, name: str = "device") -> None:
        # Bounded by the number of callers: each one awaits its call.
        self._calls: queue.SimpleQueue[tuple[str, Callable[[], None]] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        # None: idle. Written by the device thread, read by any thread.
        self.activity: Activity | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `fn(*args, **kwargs)` on the thread and return its result. Calls run in order.

        If the awaiting task is cancelled, the call still runs to its end; its exception, if any, is
        logged. Raises what `fn` raises, or InternalError after `close`.
        """
        work: Future[T] = Future()

        def call() -> None:
            try:
                work.set_result(fn(*args, **kwargs))
            except BaseException as error:
                work.set_exception(error)

        # Not asyncio.wrap_future: it would cancel work that has not begun. Not asyncio.shield: it
        # would mark the exception of abandoned work as retrieved, so that it would never be logged.
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()
        work.add_done_callback(lambda _: _wake(loop, finished))
        with self._closing:  # no call is queued behind the end marker
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
        """Record that the current call enters another part. Called by that call, on the thread."""
        call = self.activity.call if self.activity else part
        self.activity = Activity(call, part, time.monotonic(), num_rows, num_tokens)

    def stack(self) -> str:
        """Stack of the thread now, innermost frame last. May be called on any thread."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame, _MAX_STACK_FRAMES)) if frame else ""

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish the calls already queued, then end the thread. May be called twice.

        Blocks for at most `timeout_s` (None: without limit). Returns False if the thread is still
        running.
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
            del item, call  # frees arguments and results, which may be large


def _wake(loop: asyncio.AbstractEventLoop, finished: asyncio.Future[None]) -> None:
    def resolve() -> None:
        if not finished.done():
            finished.set_result(None)

    # After the loop has closed nobody awaits the result.
    if not loop.is_closed():
        try:
            loop.call_soon_threadsafe(resolve)
        except RuntimeError:
            _log.debug("the event loop closed while device work was finishing")


def _log_abandoned(work: Future[T]) -> None:
    error = work.exception()
    if error is not None:
        _log.error(
            "a call on the device thread failed after its caller was cancelled", exc_info=error
        )
