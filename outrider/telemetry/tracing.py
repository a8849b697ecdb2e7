"""Tracing of requests with OpenTelemetry, if an endpoint is configured.

A request's span starts where the request arrives. Its context (W3C `traceparent`) is sent to the
tiers, whose spans join the trace. Spans contain counts, times and names, never text or tokens. The
SDK is an extra (`otel`) and is imported only if an endpoint is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from outrider.errors import ConfigError, installs
from outrider.settings.telemetry import DEFAULT_SAMPLE_RATIO, TelemetrySettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

# The first FIRST_ROUNDS rounds of a request have spans, then one in ROUND_INTERVAL.
FIRST_ROUNDS = 8
ROUND_INTERVAL = 16
_EXPORT_TIMEOUT_S = 2.0
# OpenTelemetry logs a warning for a longer one, so longer ones are cut.
_MAX_TRACEPARENT_CHARS = 512

Value = str | int | float | bool

_current: ContextVar[Span | None] = ContextVar("outrider_span", default=None)


def current_span() -> Span | None:
    """Span of the request that this task works for; None if it is not traced."""
    return _current.get()


class Span:
    """A sampled span. May be used by one task or thread at a time."""

    def __init__(self, tracer: Tracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        self._num_rounds = 0

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """The span's context, to be sent to other services."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(self._span))
        return headers["traceparent"]

    def make_current(self) -> None:
        """Makes it the current span of this task and of those started by it."""
        _current.set(self)

    def set(self, name: str, value: Value) -> None:
        self._span.set_attribute(name, value)

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def round(self, name: str, started_at: float, **attributes: Value) -> None:
        """Adds a child span from `started_at` (time.monotonic) until now; some are left out."""
        self._num_rounds += 1
        if self._num_rounds > FIRST_ROUNDS and self._num_rounds % ROUND_INTERVAL:
            return
        from opentelemetry.trace import set_span_in_context

        now = time.time_ns()
        start = now - round((time.monotonic() - started_at) * 1e9)
        context = set_span_in_context(self._span)
        part = self._tracer.start_span(name, context, start_time=start)
        part.set_attributes(attributes)
        part.set_attribute("outrider.round", self._num_rounds)
        part.end(now)

    def end(self, failed: str | None = None) -> None:
        """Ends the span. `failed`: the error status, if it failed."""
        if failed is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, failed))
        self._span.end()


class Tracing:
    """Creates a program's spans. Without a tracer it creates none."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer

    def request(self, name: str, traceparent: str) -> Span | None:
        """Span of an incoming request; sampled like its parent trace, otherwise at random."""
        return _started(self._tracer, name, _parent(traceparent)) if self._tracer else None

    def part(self, name: str, traceparent: str) -> Span | None:
        """Span of work for a request that is traced elsewhere; None without `traceparent`."""
        if self._tracer is None:
            return None
        parent = _parent(traceparent)
        return _started(self._tracer, name, parent) if parent else None


NO_TRACING = Tracing()


def _started(tracer: Tracer, name: str, parent: Context) -> Span | None:
    from opentelemetry.trace import SpanKind

    span = tracer.start_span(name, parent, kind=SpanKind.SERVER)
    return Span(tracer, span) if span.is_recording() else None


def _parent(traceparent: str) -> Context:
    """Empty if `traceparent` is missing or malformed: by W3C's rules a new trace starts then."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers = {"traceparent": traceparent[:_MAX_TRACEPARENT_CHARS]}
    return TraceContextTextMapPropagator().extract(headers)


@contextlib.asynccontextmanager
async def tracing(service: str, settings: TelemetrySettings) -> AsyncIterator[Tracing]:
    """Tracing for the time of a block. Pending spans are exported at its end, within seconds.

    Raises ConfigError if the SDK is not installed.
    """
    if settings.otlp_endpoint is None:
        yield NO_TRACING
        return
    provider = _provider(service, settings.otlp_endpoint, settings.trace_sample_ratio)
    try:
        yield Tracing(provider.get_tracer("outrider"))
    finally:
        await asyncio.to_thread(provider.shutdown)


def _provider(service: str, endpoint: str, ratio: float | None) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint: OpenTelemetry is not installed; {installs('otel')}"
        ) from error
    share = DEFAULT_SAMPLE_RATIO if ratio is None else ratio
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(share),
        resource=Resource.create({"service.name": f"outrider-{service}"}),
    )
    exporter = OTLPSpanExporter(
        endpoint, insecure=endpoint.startswith("http://"), timeout=_EXPORT_TIMEOUT_S
    )
    # Has its own queue and thread. Spans beyond the queue's size are dropped.
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
