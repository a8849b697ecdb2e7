"""Heartbeats of a bidirectional stream: each side sends a frame at least once per interval.

An empty frame is enough. HTTP/2 pings do not work: by default, servers and proxies close
connections that send more than a few pings without data. For use on the event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from outrider.errors import InvalidRequest, Unavailable
from outrider.runtime.grpc_streams import Outbox

MIN_INTERVAL_MS = 100
MAX_INTERVAL_MS = 60_000


class Heartbeat:
    """One side of a stream: sends heartbeats and detects a peer that sends none.

    Counts intervals, not time: while this process was stopped or busy it could not receive. Frames
    waiting to be read show that the peer is alive, so only intervals of listening count.

    Runs for the time of an `async with`. When the peer is gone, the block is cancelled and raises
    Unavailable.
    """

    def __init__(self, outbox: Outbox[Any], max_missed: int) -> None:
        """`max_missed`: number of intervals without a frame after which the peer is gone."""
        self._outbox = outbox
        self._max_missed = max_missed
        self._num_missed = 0
        self._interval_s = 0.0
        self._is_busy = self._is_gone = self._is_closed = False
        self._begun = asyncio.Event()

    def begin(self, interval_ms: int) -> None:
        """Starts heartbeats at this interval. Raises InvalidRequest if it is out of range."""
        check_interval(interval_ms)
        self._interval_s = interval_ms / 1000
        self._begun.set()

    def received(self) -> None:
        """Resets the count: a frame was received."""
        self._num_missed = 0

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While the block runs, intervals are not counted: nothing is being received."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False
            self.received()

    async def _run(self) -> None:
        """Sends heartbeats and counts intervals until the peer is gone."""
        await self._begun.wait()
        while self._num_missed < self._max_missed:
            self._outbox.beat()
            await asyncio.sleep(self._interval_s)
            self._num_missed += not self._is_busy

    async def __aenter__(self) -> None:
        owner = asyncio.current_task()
        assert owner is not None, "streams are served in tasks"
        self._owner, self._num_cancelled = owner, owner.cancelling()
        self._task = asyncio.create_task(self._run(), name="heartbeat")
        self._task.add_done_callback(self._on_gone)

    def _on_gone(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self._is_closed:
            self._is_gone = True
            self._owner.cancel()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._is_closed = True
        self._task.cancel()
        if self._is_gone and self._owner.uncancel() <= self._num_cancelled:
            missed_s = self._num_missed * self._interval_s
            raise Unavailable(f"no frame was received for {missed_s:g} s") from None


def check_interval(interval_ms: int) -> None:
    """Raises InvalidRequest if the interval is out of range."""
    if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
        raise InvalidRequest(
            "heartbeat_ms", f"{interval_ms} is not in [{MIN_INTERVAL_MS}, {MAX_INTERVAL_MS}]"
        )
