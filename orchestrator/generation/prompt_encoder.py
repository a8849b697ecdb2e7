"""Threads for work that grows with a request's size: validation and encoding.

Encoding a million characters takes about 3 s and 100 MiB, without the GIL (measured on one core of
a Zen 5). Long prompts have a queue of their own, so that short prompts do not wait behind them.
Validating a million token ids takes 40 ms with the GIL, so one thread is enough for it.
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
# More requests would occupy memory and then miss their deadlines.
_MAX_LONG_WAITING = 16
_LONG_RETRY_S = 5.0
_MAX_CHECKS_WAITING = 64
_CHECK_RETRY_S = 1.0


class _Queue:
    """Thread pool with a bounded queue. Used on the event loop."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._num = 0

    async def run(self, work: Callable[[], T], *, max_waiting: int, what: str, retry_s: float) -> T:
        """Runs `work` in a thread. Raises CapacityExceeded if `max_waiting` others wait.

        `what`: description of the waiting work, for the error message.
        """
        if self._num > max_waiting:
            raise CapacityExceeded(f"{self._num} {what}", retry_s)
        self._num += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:  # if cancelled, work that has begun still runs to its end
            self._num -= 1

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


class PromptEncoding:
    """Bounds how many requests are validated and encoded at a time. Event loop only."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(_NUM_SHORT_THREADS, "encode")
        self._long = _Queue("encode-long", 1)
        self._checks = _Queue("check", 1)

    async def check(self, work: Callable[[], T]) -> T:
        """Runs the validation of a long request in a thread. Raises CapacityExceeded."""
        return await self._checks.run(
            work,
            max_waiting=_MAX_CHECKS_WAITING,
            what="requests with long token lists are waiting for validation",
            retry_s=_CHECK_RETRY_S,
        )

    async def run(self, work: Callable[[], T], num_chars: int) -> T:
        """Runs `work` in a thread. Raises CapacityExceeded if too many long prompts wait."""
        if num_chars < _LONG_CHARS:  # the admission queue bounds their number
            return await asyncio.get_running_loop().run_in_executor(self._short, work)
        return await self._long.run(
            work,
            max_waiting=_MAX_LONG_WAITING,
            what=f"prompts of over {_LONG_CHARS} characters are waiting to be encoded",
            retry_s=_LONG_RETRY_S,
        )

    def close(self) -> None:
        """Waits for running work; drops work that has not begun."""
        self._short.shutdown(cancel_futures=True)
        self._long.close()
        self._checks.close()
