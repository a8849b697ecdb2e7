"""Traces of requests over OpenTelemetry, if somebody collects them. Knows no service.

A request's span is made where it arrives; its context (W3C `traceparent`) goes with it to the
tiers, whose spans join the same trace. Spans hold counts, times and names, never text or tokens.
The SDK is an extra (`otel`) and is imported only where an endpoint is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
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

# Of a request's rounds the first so many have spans, then one in so many.
FIRST_ROUNDS = 8
ROUND_INTERVAL = 16
_EXPORT_TIMEOUT_S = 2.0
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")

Value = str | int | float | bool

_current: ContextVar[Span | None] = ContextVar("outrider_span", default=None)


def current_span() -> Span | None:
    """Of the request that this task works for; None: it is not traced."""
    return _current.get()


class Span:
    """One sampled span. Used by one task or thread at a time."""

    def __init__(self, tracer: Tracer, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span
        self._num_rounds = 0

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """Its context for whoever works for it elsewhere."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    def make_current(self) -> None:
        """For this task from now on, and for those it starts."""
        _current.set(self)

    def set(self, name: str, value: Value) -> None:
        self._span.set_attribute(name, value)

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def round(self, name: str, started_at: float, **attributes: Value) -> None:
        """A part that ends now and began at `started_at` (time.monotonic); some are left out."""
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
        """`failed`: the status, where it did not end well."""
        if failed is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, failed))
        self._span.end()


class Tracing:
    """Makes the spans of a program. Without a tracer it makes none."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer

    def request(self, name: str, traceparent: str) -> Span | None:
        """Of a request that arrives here. Sampled as its caller's trace is, else by chance."""
        if self._tracer is None:
            return None
        from opentelemetry.trace import SpanKind

        context = _parent(traceparent)
        span = self._tracer.start_span(name, context, kind=SpanKind.SERVER)
        return Span(self._tracer, span) if span.is_recording() else None

    def part(self, name: str, traceparent: str) -> Span | None:
        """Of what is done here for a request that is traced elsewhere; None without one."""
        if self._tracer is None or _parent(traceparent) is None:
            return None
        return self.request(name, traceparent)


NO_TRACING = Tracing()


def _parent(traceparent: str) -> Context | None:
    """None where there is none or it cannot be read: then, says W3C, a trace begins anew."""
    from opentelemetry.trace import (
        NonRecordingSpan,
        SpanContext,
        TraceFlags,
        set_span_in_context,
    )

    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    parent = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags & 1))
    return set_span_in_context(NonRecordingSpan(parent)) if parent.is_valid else None


@contextlib.asynccontextmanager
async def tracing(service: str, settings: TelemetrySettings) -> AsyncIterator[Tracing]:
    """For the time of a block; what is pending at its end is sent, within seconds.

    Raises ConfigError where the SDK is not installed.
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
    # A queue of its own size, a thread of its own: spans too many are dropped, not waited for.
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
