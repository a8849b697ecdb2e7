"""Heartbeats of a bidirectional stream: each side sends a frame at least once an interval.

A frame without items will do. HTTP/2 pings will not: servers and proxies of default settings close
connections that send more than a few of them without data. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from outrider.errors import InvalidRequest, Unavailable
from outrider.runtime.grpc_streams import Outbox

MIN_INTERVAL_MS = 100
MAX_INTERVAL_MS = 60_000
# A client leaves an orchestrator that sends nothing for 10 s: it is frozen or cut off. One that
# starts 1,000 streams on a busy machine was seen to need more than 5 s for its first message.
CALLER_HEARTBEAT_MS = 1_000
_CALLER_MAX_QUIET = 10


class Heartbeat:
    """One side of one stream: sends heartbeats, and notices a peer that sends none.

    Counts intervals and not time: while this process was itself stopped or busy, nothing could be
    heard. Frames that wait to be read show a living peer, so it counts only while it listens.

    Runs for the time of an `async with`, which is cancelled once the peer is gone, and raises
    Unavailable then.
    """

    def __init__(self, outbox: Outbox[Any] | None, max_quiet: int) -> None:
        """`max_quiet`: intervals without a frame after which the peer is gone.

        `outbox` None: only listens.
        """
        self._outbox = outbox
        self._max_quiet = max_quiet
        self._num_quiet = 0
        self._interval_s = 0.0
        self._is_busy = self._is_gone = self._is_over = False
        self._begun = asyncio.Event()

    def begin(self, interval_ms: int) -> None:
        """From now on both sides send frames at least this often. Raises InvalidRequest."""
        check_interval(interval_ms)
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

    async def _run(self) -> None:
        """Until the peer is gone."""
        await self._begun.wait()
        while self._num_quiet < self._max_quiet:
            if self._outbox is not None:
                self._outbox.beat()
            await asyncio.sleep(self._interval_s)
            self._num_quiet += not self._is_busy

    async def __aenter__(self) -> None:
        owner = asyncio.current_task()
        assert owner is not None, "streams are served in tasks"
        self._owner, self._num_cancelled = owner, owner.cancelling()
        self._task = asyncio.create_task(self._run(), name="heartbeat")
        self._task.add_done_callback(self._give_up)

    def _give_up(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self._is_over:
            self._is_gone = True
            self._owner.cancel()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._is_over = True
        self._task.cancel()
        if self._is_gone and self._owner.uncancel() <= self._num_cancelled:
            quiet_s = self._num_quiet * self._interval_s
            raise Unavailable(f"nothing was heard for {quiet_s:g} s") from None


def check_interval(interval_ms: int) -> None:
    """Raises InvalidRequest."""
    if not MIN_INTERVAL_MS <= interval_ms <= MAX_INTERVAL_MS:
        raise InvalidRequest(
            "heartbeat_ms", f"{interval_ms} is not in [{MIN_INTERVAL_MS}, {MAX_INTERVAL_MS}]"
        )


async def listening(call: Any) -> AsyncGenerator[Any, None]:
    """A caller's messages of a call that asked for CALLER_HEARTBEAT_MS; not the heartbeats.

    Raises Unavailable once the server is gone. To be closed where it is left.
    """
    heartbeat = Heartbeat(None, _CALLER_MAX_QUIET)
    heartbeat.begin(CALLER_HEARTBEAT_MS)
    async with heartbeat:
        async for message in call:
            with heartbeat.busy():
                if message.ByteSize():
                    yield message
