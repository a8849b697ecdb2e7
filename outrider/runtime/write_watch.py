"""Write watch: ends a stream whose client does not read. The same for gRPC and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from outrider.errors import ClientStalled

_CHECKS_PER_TIMEOUT = 10


class WriteWatch:
    """Watch over the writes of one stream. The stream's writer enters `writing` for each of them.

    For one write at a time, on the event loop.
    """

    def __init__(self) -> None:
        self.is_writing = False
        self._num_written = 0

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A write, for the block. A write that fails is the stream's last."""
        self.is_writing = True
        yield
        self.is_writing = False
        self._num_written += 1

    @contextlib.asynccontextmanager
    async def timeout(self, timeout_s: float) -> AsyncIterator[None]:
        """Cancels the block when a write has been blocked for `timeout_s`.

        Then the client does not read its stream. Raises ClientStalled, in a group.
        """
        async with asyncio.TaskGroup() as tasks:
            checking = tasks.create_task(self._check(timeout_s), name="writes")
            try:
                yield
            finally:
                checking.cancel()

    async def _check(self, timeout_s: float) -> None:
        """Counts checks instead of time: a busy event loop is not the client's fault."""
        num_checks, num_written = 0, -1
        while num_checks < _CHECKS_PER_TIMEOUT:
            await asyncio.sleep(timeout_s / _CHECKS_PER_TIMEOUT)
            is_blocked = self.is_writing and num_written == self._num_written
            num_checks, num_written = num_checks + 1 if is_blocked else 0, self._num_written
        raise ClientStalled(
            f"the client has not read its stream for {timeout_s:g} s (write_timeout_s); "
            "a named session can be resumed"
        )
