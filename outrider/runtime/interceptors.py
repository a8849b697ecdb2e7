"""A door before a server's methods: something that is asked, or kept, around each call.

gRPC's interceptors hand out handlers, not calls; this makes of the one the other. Knows neither who
is let in nor why.
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

_SAY_INTERVAL_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]
# Entered before the method, left when the call has ended. What it raises ends the call.
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
    """Why a call was refused by who it is of; a label of a metric."""

    NO_KEY = "no_key"
    UNKNOWN_KEY = "unknown_key"
    OVER_LIMIT = "over_limit"
    OVER_SESSIONS = "over_sessions"
    IDENTITY = "identity"


class Refusals:
    """Counts them, and says in the log who it was: once a second at most, or strangers fill it.

    Lives on the event loop; `by_reason` may be read on any thread.
    """

    def __init__(self) -> None:
        self.by_reason = {reason.value: 0 for reason in Reason}
        self._said_at = 0.0
        self._num_unsaid = 0

    def count(self, reason: Reason) -> None:
        self.by_reason[reason.value] += 1

    def say(self, context: Context, method: str, reason: Reason, why: str) -> None:
        """Counted, too. `why` must hold nothing that the caller has sent in secret."""
        self.count(reason)
        now = time.monotonic()
        if now - self._said_at < _SAY_INTERVAL_S:
            self._num_unsaid += 1
            return
        peer, num_unsaid = context.peer(), self._num_unsaid
        self._said_at, self._num_unsaid = now, 0
        log.warning("caller_refused", method=method, peer=peer, why=why, num_unsaid=num_unsaid)


class AccessInterceptor(ABC, grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Stands before every method but health: probes have neither names nor keys."""

    def __init__(self) -> None:
        self.refusals = Refusals()

    @abstractmethod
    def around(self, context: Context, method: str) -> AbstractAsyncContextManager[None]:
        """Entered before each call of the method, in its task; what it raises ends the call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None or is_open_to_all(details.method):
            return handler
        return guarded(handler, lambda context: self.around(context, details.method))


def is_open_to_all(method: str) -> bool:
    """Health: its callers learn only whether it serves."""
    return method.startswith(f"/{health.SERVICE_NAME}/")


def guarded(handler: Any, around: Around) -> Any:
    """The same method behind a door. No message is parsed for whom the door stays shut."""
    kind = (handler.request_streaming, handler.response_streaming)
    behaviour = getattr(handler, _NAMES[kind])
    # A lone request comes as bytes, and is parsed here; a stream's messages when they are read.
    parse = handler.request_deserializer or bytes
    opened = (lambda request: request) if handler.request_streaming else parse
    if inspect.isasyncgenfunction(behaviour):

        async def yielding(request: Any, context: Context) -> AsyncIterator[Any]:
            async with translated(context), around(context):
                async for response in behaviour(opened(request), context):
                    yield response

        method: Any = yielding
    else:

        async def answering(request: Any, context: Context) -> Any:
            async with translated(context), around(context):
                return await behaviour(opened(request), context)

        method = answering
    deserializer = handler.request_deserializer if handler.request_streaming else None
    return _MAKERS[kind](method, deserializer, handler.response_serializer)
