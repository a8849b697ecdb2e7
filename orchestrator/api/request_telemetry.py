"""Telemetry of one `Generate` request: metrics, trace and log line under one request id.

It observes the request and does not change it. It records counts, times and names, never prompts
or outputs.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from types import TracebackType

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
# A longer id of the client is cut: every log line of the request repeats it.
_MAX_ID_CHARS = 128
_MAX_WHY_CHARS = 500
# The client's deadline passes earlier at the client, by the network delay of the request.
_DEADLINE_SLACK_S = 0.2
_QUOTED = re.compile(r"""(['"]).*\1""", re.DOTALL)


def no_deadline() -> None:
    """Time left of a request without a deadline."""


class ApiTelemetry:
    """Creates the telemetry of each request. `meter` None: no metrics are counted."""

    def __init__(
        self, meter: OrchestratorMetrics | None = None, tracing: Tracing = NO_TRACING
    ) -> None:
        self._meter = meter
        self._tracing = tracing

    def of_request(
        self, headers: Mapping[str, str], time_left_s: Callable[[], float | None] = no_deadline
    ) -> RequestTelemetry:
        """Returns the telemetry to enter with `async with`, in the task of the handler.

        `headers`: the request's headers or metadata, names in lower case. `time_left_s`: time until
        the client's deadline; None: no deadline.
        """
        span = self._tracing.request("Generate", headers.get(TRACEPARENT_KEY, ""))
        return RequestTelemetry(request_id(headers), time_left_s, self._meter, span)


def request_id(headers: Mapping[str, str]) -> str:
    """Id of a request: the client's, cut to 128 characters, or a new one."""
    return (headers.get(REQUEST_ID_KEY) or secrets.token_hex(8))[:_MAX_ID_CHARS]


class RequestTelemetry:
    """Telemetry of one request; implements `RequestEvents`."""

    def __init__(
        self,
        request_id: str,
        time_left_s: Callable[[], float | None],
        meter: OrchestratorMetrics | None,
        span: Span | None,
    ) -> None:
        self.arrived_at = time.monotonic()
        self._request_id = request_id
        self._time_left_s = time_left_s
        self._meter = meter
        self._span = span
        self._has_started = False
        self._first_at: float | None = None
        self._last_at = self.arrived_at
        self._num_tokens = self._num_first = self._num_prompt = 0
        self._result: Result | None = None

    async def __aenter__(self) -> RequestTelemetry:
        # The variables are those of the request's task and the tasks that it starts.
        structlog.contextvars.bind_contextvars(request_id=self._request_id)
        if self._span is not None:
            self._span.set("request.id", self._request_id)
            self._span.make_current()
            structlog.contextvars.bind_contextvars(trace_id=self._span.trace_id)
        return self

    def session_assigned(self, session_id: str) -> None:
        """The request has a session id: the client's, or a new one."""
        structlog.contextvars.bind_contextvars(session_id=session_id)
        if self._span is not None:
            self._span.set("session.id", session_id)

    def started(self, num_prompt_tokens: int) -> None:
        """The request is admitted and has its session; its first verify request is sent next."""
        self._has_started, self._num_prompt = True, num_prompt_tokens
        queue_s = time.monotonic() - self.arrived_at
        if self._span is not None:
            self._span.event("began")
        if self._meter is not None:
            self._meter.num_prompt_tokens += num_prompt_tokens
            self._meter.gammas[id(self)] = 0
            self._meter.observe(metrics.REQUEST_QUEUE_TIME, queue_s)
            self._meter.observe(metrics.REQUEST_PROMPT_TOKENS, num_prompt_tokens)

    def sent(self, chunk: Chunk, ready_at: float) -> None:
        """A chunk was sent that was ready at `ready_at` (time.monotonic)."""
        self._result = chunk.result
        if chunk.tokens:
            self._sent_tokens(len(chunk.tokens), ready_at)
        if self._meter is not None:
            self._meter.gammas[id(self)] = self._meter.add_rounds(chunk.rounds)

    def _sent_tokens(self, num: int, ready_at: float) -> None:
        self._num_tokens += num
        if self._first_at is None:
            self._first_at, self._num_first = ready_at, num
            if self._span is not None:
                self._span.event("first_token")
            if self._meter is not None:
                self._meter.observe(metrics.TIME_TO_FIRST_TOKEN, ready_at - self.arrived_at)
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
        summary = self._summary(status) | _reason(error)
        if self._span is not None:
            for name, value in summary.items():
                self._span.set(f"outrider.{name}", value)
            self._span.end(failed=None if status == "OK" else status)
        log.info("generate", **summary)

    def _summary(self, status: str) -> dict[str, str | int | float]:
        summary: dict[str, str | int | float] = {
            "status": status,
            "num_prompt_tokens": self._num_prompt,
            "num_tokens": self._num_tokens,
            "duration_s": round(time.monotonic() - self.arrived_at, 6),
        }
        if self._result is not None:
            summary["finish"] = self._result.finish.reason.value
        if self._first_at is not None:
            summary["first_token_s"] = round(self._first_at - self.arrived_at, 6)
        return summary

    def _status(self, error: BaseException | None) -> str:
        left_s = self._time_left_s()
        is_past_deadline = left_s is not None and left_s <= _DEADLINE_SLACK_S
        if status_name(error) == "CANCELLED" and is_past_deadline:
            return "DEADLINE_EXCEEDED"
        return status_name(error)

    def _count(self, meter: OrchestratorMetrics, status: str) -> None:
        meter.gammas.pop(id(self), None)
        meter.statuses[status] += 1
        if self._result is None:
            if self._has_started and status in ("CANCELLED", "DEADLINE_EXCEEDED"):
                meter.finished[ABORT] += 1
            return
        meter.add_finish(self._result.finish.reason)
        meter.observe(metrics.E2E_REQUEST_LATENCY, self._last_at - self.arrived_at)
        meter.observe(metrics.REQUEST_GENERATION_TOKENS, self._num_tokens)
        num_later = self._num_tokens - self._num_first
        if self._first_at is not None and num_later:
            per_token_s = (self._last_at - self._first_at) / num_later
            meter.observe(metrics.TIME_PER_OUTPUT_TOKEN, per_token_s)


def _reason(error: BaseException | None) -> dict[str, str]:
    """Fields of the log line of a failed request. Quoted text is hidden: it may be the client's."""
    while isinstance(error, BaseExceptionGroup):
        error = known_error(error) or error.exceptions[0]
    if error is None:
        return {}
    entry = {"reason": type(error).__name__}
    if isinstance(error, InvalidRequest):
        entry["field"] = error.field
    if isinstance(error, OutriderError):
        why = error.why if isinstance(error, InvalidRequest) else str(error)
        entry["why"] = _QUOTED.sub(HIDDEN, why)[:_MAX_WHY_CHARS]
    if entry.get("field") == "chat":  # errors of a chat template may repeat the client's text
        del entry["why"]
    return entry
