"""Heartbeats of a bidirectional stream: each side sends a frame at least once an interval.

A frame without items will do. HTTP/2 pings will not: servers and proxies of default settings close
connections that send more than a few of them without data. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from outrider.errors import InvalidRequest, Unavailable
from outrider.streams import Outbox

MIN_INTERVAL_MS = 100
MAX_INTERVAL_MS = 60_000


class Heartbeat:
    """One side of one stream: sends heartbeats, and notices a peer that sends none.

    Counts intervals and not time: while this process was itself stopped or busy, nothing could be
    heard. Frames that wait to be read show a living peer, so it counts only while it listens.
    """

    def __init__(self, outbox: Outbox[Any], max_quiet: int) -> None:
        """`max_quiet`: intervals without a frame after which the peer is gone."""
        self._outbox = outbox
        self._max_quiet = max_quiet
        self._num_quiet = 0
        self._interval_s = 0.0
        self._is_busy = False
        self._begun = asyncio.Event()

    def begin(self, interval_ms: int) -> None:
        """From now on both sides send frames at least this often. Raises InvalidRequest."""
        if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
            raise InvalidRequest(
                "heartbeat_ms", f"{interval_ms} is not in [{MIN_INTERVAL_MS}, {MAX_INTERVAL_MS}]"
            )
        self._interval_s = interval_ms / 1000
        self._begun.set()

    def heard(self) -> None:
        """A frame came."""
        self._num_quiet = 0

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """For the time of a block nobody listens to the peer."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False
            self.heard()

    async def run(self) -> None:
        """From `begin` on; ends by cancellation. Raises Unavailable once the peer is gone."""
        await self._begun.wait()
        while self._num_quiet < self._max_quiet:
            self._outbox.beat()
            await asyncio.sleep(self._interval_s)
            self._num_quiet += not self._is_busy
        raise Unavailable(f"nothing was heard for {self._num_quiet * self._interval_s:g} s")
