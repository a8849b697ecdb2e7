"""Base class of access interceptors: checks each call before its method runs.

gRPC's interceptors get handlers, not calls; `guarded` wraps a handler so that each call is checked.
The checks are in `client_identity` and `orchestrator.admission.api_keys`.
"""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health

from outrider.runtime.grpc_status import translated

log = structlog.get_logger()

_LOG_INTERVAL_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]
# Entered before the method and left when the call has ended. An exception inside ends the call.
Around = Callable[[Context], AbstractAsyncContextManager[None]]

_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_NAMES = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class Reason(Enum):
    """Why a client's call was rejected; a label of a metric."""

    NO_KEY = "no_key"
    UNKNOWN_KEY = "unknown_key"
    OVER_LIMIT = "over_limit"
    OVER_SESSIONS = "over_sessions"
    IDENTITY = "identity"


class Refusals:
    """Counts rejected calls and logs at most one per second, so that clients cannot flood the log.

    Used on the event loop only; `by_reason` may be read on any thread.
    """

    def __init__(self) -> None:
        self.by_reason = {reason.value: 0 for reason in Reason}
        self._logged_at = 0.0
        self._num_unlogged = 0

    def count(self, reason: Reason) -> None:
        self.by_reason[reason.value] += 1

    def record(self, peer: str, method: str, reason: Reason, why: str) -> None:
        """Counts the rejection and may log it. `why` must not contain a client's secrets."""
        self.count(reason)
        now = time.monotonic()
        if now - self._logged_at < _LOG_INTERVAL_S:
            self._num_unlogged += 1
            return
        num_unlogged = self._num_unlogged
        self._logged_at, self._num_unlogged = now, 0
        log.warning("caller_refused", method=method, peer=peer, why=why, num_unlogged=num_unlogged)


class AccessInterceptor(ABC, grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Checks every method except health: probes have neither names nor keys."""

    def __init__(self) -> None:
        self.refusals = Refusals()

    @abstractmethod
    def around(self, context: Context, method: str) -> AbstractAsyncContextManager[None]:
        """Entered before each call of the method, in its task. An exception ends the call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None or is_unprotected(details.method):
            return handler
        return guarded(handler, lambda context: self.around(context, details.method))


def is_unprotected(method: str) -> bool:
    """Whether it is a health method, which reveals only whether the server is serving."""
    return method.startswith(f"/{health.SERVICE_NAME}/")


def guarded(handler: Any, around: Around) -> Any:
    """The same method with `around` entered first. Messages are parsed only after that."""
    kind = (handler.request_streaming, handler.response_streaming)
    behaviour = getattr(handler, _NAMES[kind])
    # A single request arrives as bytes and is parsed here; a stream's messages are parsed by gRPC.
    parse = handler.request_deserializer or bytes
    parsed = (lambda request: request) if handler.request_streaming else parse
    if inspect.isasyncgenfunction(behaviour):

        async def yielding(request: Any, context: Context) -> AsyncIterator[Any]:
            async with translated(context), around(context):
                async for response in behaviour(parsed(request), context):
                    yield response

        method: Any = yielding
    else:

        async def answering(request: Any, context: Context) -> Any:
            async with translated(context), around(context):
                return await behaviour(parsed(request), context)

        method = answering
    deserializer = handler.request_deserializer if handler.request_streaming else None
    return _MAKERS[kind](method, deserializer, handler.response_serializer)
