"""What a program tells with: its metrics' exposition and its tracing. Knows no program."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from outrider.settings.telemetry import TelemetrySettings
from outrider.telemetry.exposition import Exposition
from outrider.telemetry.tracing import Tracing, tracing


@dataclass(frozen=True)
class Telemetry:
    exposition: Exposition
    tracing: Tracing

    @property
    def is_metered(self) -> bool:
        """Whether anybody can read what is counted."""
        return self.exposition.port is not None


@contextlib.asynccontextmanager
async def telemetry(
    service: str, host: str, settings: TelemetrySettings
) -> AsyncIterator[Telemetry]:
    """For the time of a block. Raises ConfigError for a port, or an SDK that is not there."""
    exposition = Exposition(host, settings)
    async with tracing(service, settings) as made, exposition.serving():
        yield Telemetry(exposition, made)
