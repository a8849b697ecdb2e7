"""Encodes prompts in threads: short ones at once, long ones one after the other.

Encoding takes about 3 s and 100 MiB for a million characters (measured, 1 core of a Zen 5), without
the GIL. Long prompts have a queue of their own, so that short ones do not wait behind them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from outrider.errors import CapacityExceeded

T = TypeVar("T")

# About 50 ms of encoding.
_LONG_CHARS = 16_384
_NUM_SHORT_THREADS = 4
# More would hold their messages in memory only to miss their deadlines.
_MAX_LONG_WAITING = 16
_LONG_RETRY_S = 5.0


class PromptEncoding:
    """Bounds how many prompts are encoded at a time. Lives on the event loop."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(_NUM_SHORT_THREADS, "encode")
        self._long = ThreadPoolExecutor(1, "encode-long")
        self._num_long = 0

    async def run(self, work: Callable[[], T], num_chars: int) -> T:
        """Runs `work` in a thread. Raises CapacityExceeded where too many long prompts wait."""
        loop = asyncio.get_running_loop()
        if num_chars < _LONG_CHARS:
            return await loop.run_in_executor(self._short, work)
        if self._num_long > _MAX_LONG_WAITING:
            raise CapacityExceeded(
                f"{self._num_long} prompts of over {_LONG_CHARS} characters wait to be encoded",
                _LONG_RETRY_S,
            )
        self._num_long += 1
        try:
            return await loop.run_in_executor(self._long, work)
        finally:  # a prompt under way is encoded to its end, though nobody waits for it
            self._num_long -= 1

    def close(self) -> None:
        """Waits for the prompts under way, not for those that have not begun."""
        for pool in (self._short, self._long):
            pool.shutdown(cancel_futures=True)
