"""Traffic recorder: samples generations and writes their records to files, in the background.

Off unless the operator names a directory. It never delays a generation: records wait in a bounded
queue, and are dropped and counted when it is full or the directory cannot be written.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import structlog

from orchestrator.generation.observation import GenerationObserver
from orchestrator.generation.preparation import PreparedTurn
from orchestrator.sessions import Lease
from orchestrator.traffic.files import Retention, TrafficFiles
from orchestrator.traffic.record import ModelNames, TrafficRecord
from outrider.settings.observation import ObservationSettings

log = structlog.get_logger()

# Records that wait to be written; a record is at most a few megabytes.
_MAX_PENDING = 64
# Interval at which old files are deleted without traffic.
_DELETE_INTERVAL_S = 600.0
_MB = 1 << 20
NO_RECORDS = {"written": 0, "dropped": 0}


class TrafficRecorder:
    """Recorder of one orchestrator. `names` returns the fingerprints of the target's model."""

    def __init__(self, settings: ObservationSettings, names: Callable[[], ModelNames]) -> None:
        assert settings.traffic_dir is not None, "recording is on"
        retention = Retention(settings.traffic_max_mb * _MB, 3600 * settings.traffic_max_age_h)
        self._files = TrafficFiles(Path(settings.traffic_dir), retention)
        self._share = settings.traffic_share
        self._num_top = settings.traffic_top_tokens
        self._names = names
        self._pending: asyncio.Queue[TrafficRecord] = asyncio.Queue(_MAX_PENDING)
        # Records by outcome.
        self.records = Counter(NO_RECORDS)
        self._is_failing = False

    def observers(self, prepared: PreparedTurn, lease: Lease) -> Sequence[GenerationObserver]:
        """The record of a generation that is sampled; none for others and resumed ones."""
        if prepared.resumed is not None or random.random() >= self._share:
            return ()
        return (TrafficRecord(self._names(), self._num_top, self._add),)

    def _add(self, record: TrafficRecord) -> None:
        try:
            self._pending.put_nowait(record)
        except asyncio.QueueFull:
            self.records["dropped"] += 1

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Writes records for the block, and those that are left at its end."""
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(self._write_all(), name="traffic")
            try:
                yield
            finally:
                writing.cancel()
        await self._write(self._take())

    async def _write_all(self) -> None:
        while True:
            first = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DELETE_INTERVAL_S):
                    first = await self._pending.get()
            await asyncio.shield(self._write([first, *self._take()] if first is not None else []))

    def _take(self) -> list[TrafficRecord]:
        return [self._pending.get_nowait() for _ in range(self._pending.qsize())]

    async def _write(self, records: list[TrafficRecord]) -> None:
        """Writes records and deletes old files. A failure is logged once, until one succeeds."""
        try:
            await asyncio.to_thread(self._write_blocking, records)
            self.records["written"] += len(records)
            self._is_failing = False
        except OSError as error:
            self.records["dropped"] += len(records)
            if not self._is_failing:
                log.warning("traffic_not_recorded", why=error.strerror or str(error))
            self._is_failing = True

    def _write_blocking(self, records: list[TrafficRecord]) -> None:
        if records:
            self._files.append([record.line() for record in records])
        else:
            self._files.delete_old()
