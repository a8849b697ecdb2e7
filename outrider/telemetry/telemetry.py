"""Telemetry of one program: the metrics exposition and tracing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from outrider.settings.telemetry import TelemetrySettings
from outrider.telemetry.exposition import Exposition
from outrider.telemetry.tracing import Tracing, tracing


@dataclass(frozen=True)
class Telemetry:
    """`is_metered`: whether metrics are exposed, so that counting is useful."""

    exposition: Exposition
    tracing: Tracing
    is_metered: bool


@contextlib.asynccontextmanager
async def telemetry(
    service: str, host: str, settings: TelemetrySettings, *, has_http: bool = False
) -> AsyncIterator[Telemetry]:
    """Telemetry for the time of a block. `has_http`: metrics are exposed by HTTP, too.

    Raises ConfigError if the port is in use or the OpenTelemetry SDK is not installed.
    """
    exposition = Exposition(host, settings)
    async with tracing(service, settings) as spans, exposition.serving():
        yield Telemetry(exposition, spans, has_http or exposition.port is not None)
