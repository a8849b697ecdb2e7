"""Threads for the work on a request that grows with its size: checks and encoding.

Encoding takes about 3 s and 100 MiB for a million characters (measured, 1 core of a Zen 5), without
the GIL. Long prompts have a queue of their own, so that short ones do not wait behind them. The
check of a long list of tokens takes 40 ms for a million, with the GIL: one thread does them all.
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
_MAX_CHECKS_WAITING = 64
_CHECK_RETRY_S = 1.0


class _Queue:
    """Threads with a bounded queue. Used on the event loop."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._num = 0

    async def run(self, work: Callable[[], T], *, max_waiting: int, what: str, retry_s: float) -> T:
        """Raises CapacityExceeded when `max_waiting` others wait."""
        if self._num > max_waiting:
            raise CapacityExceeded(f"{self._num} {what}", retry_s)
        self._num += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:  # work under way goes on to its end, though nobody waits for it
            self._num -= 1

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


class PromptEncoding:
    """Bounds how many requests are checked and encoded at a time. Lives on the event loop."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(_NUM_SHORT_THREADS, "encode")
        self._long = _Queue("encode-long", 1)
        self._checks = _Queue("check", 1)

    async def check(self, work: Callable[[], T]) -> T:
        """Runs the check of a long request in a thread. Raises CapacityExceeded."""
        return await self._checks.run(
            work,
            max_waiting=_MAX_CHECKS_WAITING,
            what="requests with long lists of tokens wait to be checked",
            retry_s=_CHECK_RETRY_S,
        )

    async def run(self, work: Callable[[], T], num_chars: int) -> T:
        """Runs `work` in a thread. Raises CapacityExceeded when too many long prompts wait."""
        if num_chars < _LONG_CHARS:  # admission bounds these
            return await asyncio.get_running_loop().run_in_executor(self._short, work)
        return await self._long.run(
            work,
            max_waiting=_MAX_LONG_WAITING,
            what=f"prompts of over {_LONG_CHARS} characters wait to be encoded",
            retry_s=_LONG_RETRY_S,
        )

    def close(self) -> None:
        """Waits for the work under way, not for work that has not begun."""
        self._short.shutdown(cancel_futures=True)
        self._long.close()
        self._checks.close()
