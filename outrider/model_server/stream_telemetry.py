"""Telemetry of a model service's streams: counts failures and traces requests.

Observes frames and results without changing them. Reads only the fields that both tiers' frames
share: opens, requests, closes. For use on the event loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.model_server.messages import Failure, FailureReason
from outrider.model_server.metrics import ModelServerMetrics
from outrider.telemetry.tracing import NO_TRACING, Span, Tracing

Frame = Any
Item = Any
# Session ids in traces are cut: they come from the peer.
_MAX_ID_CHARS = 128
# A frame's items that expect an answer, each with its number of draft tokens.
Asks = Callable[[Frame], Iterable[tuple[Item, int]]]


@dataclass(frozen=True)
class ReplicaTelemetry:
    """Telemetry of one replica. `meter` None: no metrics are collected."""

    meter: ModelServerMetrics | None = None
    tracing: Tracing = NO_TRACING

    def stream(self, part: str, asks: Asks) -> StreamTelemetry:
        """Telemetry of a new stream. `part`: name prefix of the tier's spans.

        `asks`: a frame's items that expect an answer, each with its number of draft tokens.
        """
        return StreamTelemetry(self, part, asks)


class StreamTelemetry:
    """Telemetry of one stream. Must be called in the order of frames and results."""

    def __init__(self, watch: ReplicaTelemetry, part: str, asks: Asks) -> None:
        self._watch = watch
        self._part = part
        self._asks = asks
        # Spans of the traced generations; start time and γ of their pending requests.
        self._spans: dict[int, Span] = {}
        self._asked: dict[int, tuple[float, int]] = {}

    def read(self, frame: Frame) -> None:
        """Records a received frame."""
        for item in frame.opens:
            if item.traceparent:
                self._opened(item)
        if not self._spans:
            return
        now = time.monotonic()
        for item, gamma in self._asks(frame):
            if item.generation_id in self._spans:
                self._asked[item.generation_id] = (now, gamma)
        for item in frame.closes:
            self._end(item.generation_id)

    def _opened(self, item: Item) -> None:
        span = self._watch.tracing.part(self._part, item.traceparent)
        if span is not None:
            self._end(item.generation_id)
            self._spans[item.generation_id] = span
            span.set("session.id", item.session_id[:_MAX_ID_CHARS])

    def answered(self, results: Sequence[Any]) -> None:
        """Records results before they are sent."""
        for result in results:
            number = result.key.generation_id
            if isinstance(result, Failure):
                if self._watch.meter is not None:
                    self._watch.meter.observe_failure(result.reason)
                self._failed(number, result.reason)
            elif number in self._asked:
                asked_at, gamma = self._asked.pop(number)
                self._spans[number].round(f"{self._part} round", asked_at, gamma=gamma)

    def _failed(self, number: int, reason: FailureReason) -> None:
        if reason is FailureReason.KV_LOST:  # still open: its orchestrator sends the context again
            if number in self._spans:
                self._spans[number].event(reason.value)
        else:
            self._end(number, reason.value)

    def closed(self) -> None:
        """Ends all spans at the end of the stream."""
        for number in list(self._spans):
            self._end(number, "stream ended")

    def _end(self, number: int, failed: str | None = None) -> None:
        self._asked.pop(number, None)
        span = self._spans.pop(number, None)
        if span is not None:
            span.end(failed)
