"""A collector of traces in memory: real OTLP over gRPC on a free port."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

import outrider.telemetry.tracing


@dataclass(frozen=True)
class ReceivedSpan:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    duration_ns: int
    status: str


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)
    # The raw requests, to search them for text that must not appear.
    raw: list[bytes] = field(default_factory=list)

    async def Export(self, request: Any, context: Any) -> Any:
        self.raw.append(request.SerializeToString())
        for resource in request.resource_spans:
            named = _attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_span(str(named["service.name"]), span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, service: str, name: str) -> list[ReceivedSpan]:
        return [span for span in self.spans if (span.service, span.name) == (service, name)]


def _span(service: str, span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        service=service.removeprefix("outrider-"),
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        duration_ns=span.end_time_unix_nano - span.start_time_unix_nano,
        status=span.status.message,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Services in this process export without a time limit, so no span is dropped."""
    receiver = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(outrider.telemetry.tracing, "_EXPORT_TIMEOUT_S", 60.0)
            yield receiver
    finally:
        await server.stop(0)
