"""Utilization of simulated tiers: the share of time in a pass, measured from outside.

A simulated pass is a sleep of the device thread, and Linux reports where a thread waits. So the
services need no counters. Not meaningful for real models.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from outrider.errors import ConfigError

# Passes take tens of milliseconds; a sample takes a few microseconds.
_INTERVAL_S = 0.004
_ASLEEP = "nanosleep"


class BusyWatch:
    """Samples the tiers inside its context. `pids`: process ids of the tiers, by name."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._tasks = {name: Path(f"/proc/{pid}/task") for name, pid in pids.items()}
        # The device thread of each tier, once seen asleep; no other thread of a tier sleeps.
        self._threads: dict[str, Path] = {}
        self._samples: list[tuple[float, frozenset[str]]] = []
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> BusyWatch:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._watching is not None, "it was entered"
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    def has_seen(self, name: str) -> bool:
        """Whether the tier has been seen in a pass."""
        return name in self._threads

    def has_samples(self, begin: float, end: float) -> bool:
        """Whether there are samples between two readings of time.monotonic()."""
        return any(begin <= at <= end for at, _ in self._samples)

    def share(self, name: str, begin: float, end: float) -> float:
        """Share of samples in a pass, between two readings of time.monotonic().

        Raises ConfigError without samples, or if no tier was ever seen in a pass: this system does
        not report where threads wait.
        """
        seen = [busy for at, busy in self._samples if begin <= at <= end]
        if not self._threads or not seen:
            raise ConfigError(f"{self._tasks[name]}: cannot observe whether the {name} is busy")
        return sum(name in busy for busy in seen) / len(seen)

    async def _watch(self) -> None:
        while True:
            busy = frozenset(name for name in self._tasks if self._is_busy(name))
            self._samples.append((time.monotonic(), busy))
            await asyncio.sleep(_INTERVAL_S)

    def _is_busy(self, name: str) -> bool:
        if name in self._threads:
            return _is_asleep(self._threads[name])
        for thread in self._tasks[name].glob("*"):
            if _is_asleep(thread):
                self._threads[name] = thread
                return True
        return False


def _is_asleep(thread: Path) -> bool:
    try:
        return _ASLEEP in (thread / "wchan").read_text()
    except OSError:  # it ended
        return False
