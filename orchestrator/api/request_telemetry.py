"""One `Generate` call as operators see it: counted, timed, traced, logged, under one request id.

Told what happens to the call; does nothing to it. Knows neither rounds nor how metrics, traces and
logs are kept. What a caller says or is told is never part of it: counts, times and names only.
"""

from __future__ import annotations

import re
import secrets
import time
from types import TracebackType
from typing import Any

import grpc
import structlog

from orchestrator.api.metrics import ABORT, OrchestratorMetrics
from orchestrator.generation.output import Chunk, Result
from outrider.errors import ClientStalled, InvalidRequest, OutriderError
from outrider.runtime.grpc_status import known_error, status_name
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.logs import HIDDEN
from outrider.telemetry.tracing import NO_TRACING, Span, Tracing

log = structlog.get_logger()

REQUEST_ID_KEY = "x-request-id"
TRACEPARENT_KEY = "traceparent"
# A longer one of a caller's is cut: it is repeated in every line of the call's log.
_MAX_ID_CHARS = 128
_MAX_WHY_CHARS = 500
# A client's deadline passes there earlier than here, by the time that its request was under way.
_DEADLINE_SLACK_S = 0.2
_QUOTED = re.compile(r"""(['"]).*\1""", re.DOTALL)

Context = grpc.aio.ServicerContext[Any, Any]


class RequestTelemetry:
    """Makes them. `meter` None: nothing is counted."""

    def __init__(
        self, meter: OrchestratorMetrics | None = None, tracing: Tracing = NO_TRACING
    ) -> None:
        self._meter = meter
        self._tracing = tracing

    def call(self, context: Context) -> TrackedRequest:
        """For the time of an `async with`; in the call's own task."""
        metadata = {key: value for key, value in context.invocation_metadata() or ()}
        request_id = str(metadata.get(REQUEST_ID_KEY) or secrets.token_hex(8))[:_MAX_ID_CHARS]
        span = self._tracing.request("Generate", str(metadata.get(TRACEPARENT_KEY, "")))
        return TrackedRequest(request_id, context, self._meter, span)


class TrackedRequest:
    """`asked_at`: seconds of the monotonic clock."""

    def __init__(
        self,
        request_id: str,
        context: Context,
        meter: OrchestratorMetrics | None,
        span: Span | None,
    ) -> None:
        self.asked_at = time.monotonic()
        self._request_id = request_id
        self._context = context
        self._meter = meter
        self._span = span
        self._has_begun = False
        self._first_at: float | None = None
        self._last_at = self.asked_at
        self._num_tokens = self._num_first = self._num_prompt = 0
        self._result: Result | None = None

    async def __aenter__(self) -> TrackedRequest:
        # The task is the call's own, and those it starts inherit: no other call sees them.
        structlog.contextvars.bind_contextvars(request_id=self._request_id)
        if self._span is not None:
            self._span.set("request.id", self._request_id)
            self._span.make_current()
            structlog.contextvars.bind_contextvars(trace_id=self._span.trace_id)
        return self

    def in_session(self, session_id: str) -> None:
        """The session is known, given or made."""
        structlog.contextvars.bind_contextvars(session_id=session_id)
        if self._span is not None:
            self._span.set("session.id", session_id)

    def began(self, num_prompt_tokens: int) -> None:
        """Its turn has come, and it has its session and its place: its first row is the next."""
        self._has_begun, self._num_prompt = True, num_prompt_tokens
        queue_s = time.monotonic() - self.asked_at
        if self._span is not None:
            self._span.event("began")
        if self._meter is not None:
            self._meter.num_prompt_tokens += num_prompt_tokens
            self._meter.gammas[id(self)] = 0
            self._meter.observe(metrics.REQUEST_QUEUE_TIME, queue_s)
            self._meter.observe(metrics.REQUEST_PROMPT_TOKENS, num_prompt_tokens)

    def sent(self, chunk: Chunk, ready_at: float) -> None:
        """The caller was sent a chunk, which was there at `ready_at`."""
        self._result = chunk.result
        if chunk.tokens:
            self._sent_tokens(len(chunk.tokens), ready_at)
        if self._meter is not None:
            self._meter.gammas[id(self)] = self._meter.sent(chunk.rounds)

    def _sent_tokens(self, num: int, ready_at: float) -> None:
        self._num_tokens += num
        if self._first_at is None:
            self._first_at, self._num_first = ready_at, num
            if self._span is not None:
                self._span.event("first_token")
            if self._meter is not None:
                self._meter.observe(metrics.TIME_TO_FIRST_TOKEN, ready_at - self.asked_at)
        elif self._meter is not None:
            self._meter.inter_token.observe(ready_at - self._last_at)
        self._last_at = ready_at

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType
    ) -> None:
        status = self._status(error)
        if self._meter is not None:
            self._count(self._meter, status)
            self._meter.num_unread_streams += isinstance(known_error(error), ClientStalled)
        told = self._summary(status) | _reason(error)
        if self._span is not None:
            for name, value in told.items():
                self._span.set(f"outrider.{name}", value)
            self._span.end(failed=None if status == "OK" else status)
        log.info("generate", **told)

    def _summary(self, status: str) -> dict[str, str | int | float]:
        told: dict[str, str | int | float] = {
            "status": status,
            "num_prompt_tokens": self._num_prompt,
            "num_tokens": self._num_tokens,
            "duration_s": round(time.monotonic() - self.asked_at, 6),
        }
        if self._result is not None:
            told["finish"] = self._result.finish.reason.value
        if self._first_at is not None:
            told["first_token_s"] = round(self._first_at - self.asked_at, 6)
        return told

    def _status(self, error: BaseException | None) -> str:
        left_s = self._context.time_remaining()
        is_due = left_s is not None and left_s <= _DEADLINE_SLACK_S
        if status_name(error) == "CANCELLED" and is_due:
            return "DEADLINE_EXCEEDED"
        return status_name(error)

    def _count(self, meter: OrchestratorMetrics, status: str) -> None:
        meter.gammas.pop(id(self), None)
        meter.statuses[status] += 1
        if self._result is None:
            if self._has_begun and status in ("CANCELLED", "DEADLINE_EXCEEDED"):
                meter.finished[ABORT] += 1
            return
        meter.finished_as(self._result.finish.reason)
        meter.observe(metrics.E2E_REQUEST_LATENCY, self._last_at - self.asked_at)
        meter.observe(metrics.REQUEST_GENERATION_TOKENS, self._num_tokens)
        num_later = self._num_tokens - self._num_first
        if self._first_at is not None and num_later:
            each_s = (self._last_at - self._first_at) / num_later
            meter.observe(metrics.TIME_PER_OUTPUT_TOKEN, each_s)


def _reason(error: BaseException | None) -> dict[str, str]:
    """Why a call did not end well, without what the caller has said: that stands in quotes."""
    while isinstance(error, BaseExceptionGroup):
        error = known_error(error) or error.exceptions[0]
    if error is None:
        return {}
    told = {"reason": type(error).__name__}
    if isinstance(error, InvalidRequest):
        told["field"] = error.field
    if isinstance(error, OutriderError):
        why = error.why if isinstance(error, InvalidRequest) else str(error)
        told["why"] = _QUOTED.sub(HIDDEN, why)[:_MAX_WHY_CHARS]
    if told.get("field") == "chat":  # what a model's template says may be the caller's words
        del told["why"]
    return told
