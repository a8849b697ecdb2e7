"""Errors in OpenAI's shape, with their HTTP status."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import structlog

from outrider import errors
from outrider.runtime.grpc_status import known_error

log = structlog.get_logger()


class ClientGone(Exception):
    """The client has closed its connection."""


class Refused(errors.OutriderError):
    """A request that HTTP refuses by its own rules. `param`: the request's field, if it is one."""

    def __init__(
        self, why: str, status: int, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(why)
        self.status = status
        self.param = param
        self.code = code


@dataclass(frozen=True)
class _Kind:
    """How errors of a class are answered."""

    status: int
    type: str
    code: str | None = None


_INVALID = "invalid_request_error"
_UNAVAILABLE = _Kind(503, "server_error", "unavailable")
_INTERNAL = _Kind(500, "server_error", "internal_error")
_KINDS: tuple[tuple[type[errors.OutriderError], _Kind], ...] = (
    (errors.InvalidRequest, _Kind(400, _INVALID)),
    (errors.Unauthenticated, _Kind(401, _INVALID, "invalid_api_key")),
    (errors.PermissionDenied, _Kind(403, "permission_error")),
    (errors.SessionNotFound, _Kind(404, _INVALID, "session_not_found")),
    (errors.SessionInUse, _Kind(409, "conflict_error", "session_in_use")),
    (errors.LeaseLost, _Kind(409, "conflict_error", "lease_lost")),
    (errors.UnreadableRecord, _Kind(400, _INVALID, "unreadable_record")),
    (errors.KVNeverFits, _Kind(400, _INVALID, "context_length_exceeded")),
    (errors.CapacityExceeded, _Kind(429, "rate_limit_error", "rate_limit_exceeded")),
    (errors.KVLost, _UNAVAILABLE),
    (errors.Unavailable, _UNAVAILABLE),
)
# Fields whose names differ from those of gRPC, which `generation.validation` uses.
_FIELDS = {
    "text": "prompt",
    "token_ids": "prompt",
    "input": "prompt",
    "chat": "messages",
    "chat.messages.role": "messages.role",
}


@dataclass(frozen=True)
class Answer:
    """An error as it is sent. `retry_after_s` None: no Retry-After header."""

    status: int
    body: dict[str, Any]
    retry_after_s: int | None = None


def answer_of(error: BaseException) -> Answer:
    """How an error is answered. A defect is logged and answered without details."""
    known = known_error(error)
    if known is None:
        log.error("call_failed", error=repr(error), exc_info=error)
        known = errors.InternalError("an internal error of the service; see its log")
    elif isinstance(known, errors.InternalError):
        log.error("call_failed", error=str(known), exc_info=known)
    elif known.shown != str(known):
        log.warning("call_refused", why=str(known))
    kind = _kind(known)
    message, param = known.shown, None
    if isinstance(known, errors.InvalidRequest):
        param = field_name(known.field)
        message = f"{param}: {known.why}"
    elif isinstance(known, Refused):
        param = known.param
    shown = {"message": message, "type": kind.type, "param": param, "code": kind.code}
    retry_after_s = None
    if isinstance(known, errors.CapacityExceeded | errors.Unavailable):
        retry_after_s = max(1, math.ceil(known.retry_after_s))
    return Answer(kind.status, {"error": shown}, retry_after_s)


def field_name(field: str) -> str:
    """Name in HTTP of a field that validation names as gRPC does."""
    return _FIELDS.get(field, field.removeprefix("sampling."))


def _kind(error: errors.OutriderError) -> _Kind:
    if isinstance(error, Refused):
        return _Kind(error.status, _INVALID, error.code)
    return next((kind for cls, kind in _KINDS if isinstance(error, cls)), _INTERNAL)
