"""What a model service's streams carry, as operators see it: failures counted, requests traced.

Told of frames and results as they pass; does nothing to them. Reads of frames only what both tiers'
have alike: opens, what is asked for, closes. Lives on the event loop.
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
# Whatever a stranger sends.
_MAX_ID_CHARS = 128
# The items of a frame that want an answer, each with its number of draft tokens.
Asks = Callable[[Frame], Iterable[tuple[Item, int]]]


@dataclass(frozen=True)
class ReplicaTelemetry:
    """Of one replica. `meter` None: nothing is counted."""

    meter: ModelServerMetrics | None = None
    tracing: Tracing = NO_TRACING

    def stream(self, part: str, asks: Asks) -> StreamTelemetry:
        """Of a new stream; `part` is what the tier does for a request, as its spans are named.

        `asks`: the items of a frame that want an answer, each with its number of draft tokens.
        """
        return StreamTelemetry(self, part, asks)


class StreamTelemetry:
    """Of one stream: told in the order of what it tells."""

    def __init__(self, watch: ReplicaTelemetry, part: str, asks: Asks) -> None:
        self._watch = watch
        self._part = part
        self._asks = asks
        # Of the generations that are traced, and since when they wait for an answer, with what γ.
        self._spans: dict[int, Span] = {}
        self._asked: dict[int, tuple[float, int]] = {}

    def read(self, frame: Frame) -> None:
        """Came in."""
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
        """Goes out."""
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
        if reason is FailureReason.KV_LOST:  # it is still open, and is asked again
            if number in self._spans:
                self._spans[number].event(reason.value)
        else:
            self._end(number, reason.value)

    def closed(self) -> None:
        """The stream has ended."""
        for number in list(self._spans):
            self._end(number, "stream ended")

    def _end(self, number: int, failed: str | None = None) -> None:
        self._asked.pop(number, None)
        span = self._spans.pop(number, None)
        if span is not None:
            span.end(failed)
