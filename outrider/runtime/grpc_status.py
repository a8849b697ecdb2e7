"""gRPC status of errors and message writer, shared by the three servers.

The only module that maps errors of `outrider.errors` to gRPC status codes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from datetime import timedelta
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from outrider import errors
from outrider.runtime.write_watch import WriteWatch

log = structlog.get_logger()

# A status travels in HTTP/2 headers. Peers accept 8 KiB; with more even the code is lost.
MAX_STATUS_CHARS = 1_000
# After this time gRPC sends the status on its own, and the handler ends.
_STATUS_WAIT_S = 2.0

_STATUS: tuple[tuple[type[errors.OutriderError], int], ...] = (
    (errors.InvalidRequest, code_pb2.INVALID_ARGUMENT),
    (errors.Unauthenticated, code_pb2.UNAUTHENTICATED),
    (errors.PermissionDenied, code_pb2.PERMISSION_DENIED),
    (errors.SessionNotFound, code_pb2.NOT_FOUND),
    (errors.SessionInUse, code_pb2.ABORTED),
    (errors.UnreadableRecord, code_pb2.FAILED_PRECONDITION),
    (errors.LeaseLost, code_pb2.ABORTED),
    (errors.CapacityExceeded, code_pb2.RESOURCE_EXHAUSTED),
    (errors.KVNeverFits, code_pb2.RESOURCE_EXHAUSTED),
    (errors.ClientStalled, code_pb2.CANCELLED),
    (errors.KVLost, code_pb2.UNAVAILABLE),
    (errors.Unavailable, code_pb2.UNAVAILABLE),
    (errors.ConfigError, code_pb2.FAILED_PRECONDITION),
)


# Names of all status codes that a call can end with.
STATUS_NAMES: tuple[str, ...] = (
    "OK",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "UNKNOWN",
    "INTERNAL",
    *dict.fromkeys(str(code_pb2.Code.Name(code)) for _, code in _STATUS if code),
)


def status_of(error: errors.OutriderError) -> status_pb2.Status:
    """Rich status of an error, with a field violation or a retry hint where it applies."""
    code = next((c for kind, c in _STATUS if isinstance(error, kind)), code_pb2.INTERNAL)
    status = status_pb2.Status(code=code, message=_short(error.shown))
    detail = any_pb2.Any()
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=_short(error.why)
        )
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        status.details.append(detail)
    elif isinstance(error, errors.CapacityExceeded | errors.Unavailable):
        delay = duration_pb2.Duration()
        delay.FromTimedelta(timedelta(seconds=error.retry_after_s))
        detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status.details.append(detail)
    return status


def status_name(error: BaseException | None) -> str:
    """Name of the status that a call ends with after this error; None: success."""
    if error is None:
        return "OK"
    known = known_error(error) if isinstance(error, BaseExceptionGroup) else error
    if isinstance(known, errors.OutriderError):
        return str(code_pb2.Code.Name(status_of(known).code))
    if _is_client_gone(error):
        return "CANCELLED"
    return "INTERNAL" if _is_defect(error) else "UNKNOWN"


def _is_client_gone(error: BaseException) -> bool:
    """Whether the client has gone: then a write fails, possibly before the call is cancelled."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_client_gone, error.exceptions))
    return isinstance(error, (asyncio.CancelledError, grpc.aio.InternalError))


def _is_defect(error: BaseException) -> bool:
    """Whether it is a defect of Outrider, not an error of gRPC."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_defect, error.exceptions))
    return isinstance(error, Exception) and not isinstance(error, grpc.aio.BaseError)


def _short(text: str) -> str:
    return text if len(text) <= MAX_STATUS_CHARS else f"{text[:MAX_STATUS_CHARS]} …"


@contextlib.asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Ends the call with the status of an OutriderError raised inside, alone or by a TaskGroup.

    A failed write means that the client has gone: CANCELLED. Any other exception is a defect:
    INTERNAL, without details for the client. The error's traceback is dropped: from Python 3.12 on
    it is part of a reference cycle through this context manager's frames. The cycle would keep a
    rejected message of megabytes until the garbage collector runs.
    """
    try:
        yield
    except errors.OutriderError as error:
        await _abort(context, error)
        error.__traceback__ = None
    except BaseExceptionGroup as group:
        known = known_error(group)
        if known is not None:
            await _abort(context, known)
            known.__traceback__ = group.__traceback__ = None
        elif group.split(grpc.aio.InternalError)[1] is None:
            await _end(context, _CLIENT_GONE)
        elif isinstance(group, ExceptionGroup) and group.split(grpc.aio.BaseError)[0] is None:
            await _abort(context, _defect(group))
        else:
            raise
    except grpc.aio.InternalError:
        await _end(context, _CLIENT_GONE)
    except grpc.aio.BaseError:
        raise
    except Exception as error:
        await _abort(context, _defect(error))


def _defect(error: Exception) -> errors.InternalError:
    """Wraps the exception; gRPC itself would send the exception's text to the client."""
    defect = errors.InternalError("an internal error of the service; see its log", repr(error))
    defect.__cause__ = error
    return defect


class StreamWriter:
    """Writes a call's messages so that the call can be ended with a status at any time.

    gRPC sends the call's metadata with the first message. If that write is cancelled, gRPC sends
    the metadata again with the status; its core rejects both, and the client gets no answer before
    its deadline. So the metadata is sent first and is not cancelled.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._has_begun = False
        self._watch = WriteWatch()
        # Time of the last message (event loop's clock); at first, of this object's creation.
        self._written_at = asyncio.get_running_loop().time()
        self._lock = asyncio.Lock()

    async def write(self, message: Any) -> None:
        """Sends a message. Raises grpc.aio.InternalError if the client has gone."""
        async with self._lock:
            with self._watch.writing():
                if not self._has_begun:
                    self._has_begun = True
                    await _uncancelled(self._context.send_initial_metadata(()))
                await self._context.write(message)
            self._written_at = asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def heartbeats(self, heartbeat: Any, interval_ms: int) -> AsyncIterator[None]:
        """Sends `heartbeat` whenever nothing was sent for `interval_ms`; 0: never.

        Messages serve as heartbeats, too. This saves CPU time with 1,000 streams.
        """
        sending = asyncio.create_task(self._send_heartbeats(heartbeat, interval_ms))
        try:
            yield
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send_heartbeats(self, heartbeat: Any, interval_ms: int) -> None:
        loop, interval_s = asyncio.get_running_loop(), interval_ms / 1000
        while interval_s:
            wait_s = self._written_at + interval_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif self._watch.is_writing:
                await asyncio.sleep(interval_s)
            else:
                await self.write(heartbeat)

    def write_timeout(self, timeout_s: float) -> contextlib.AbstractAsyncContextManager[None]:
        """As `WriteWatch.timeout`."""
        return self._watch.timeout(timeout_s)


async def _uncancelled(work: Coroutine[Any, Any, None]) -> None:
    """Awaits short work to its end; a cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    # Retrieves the exception if the client has gone while this task was cancelled.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=_STATUS_WAIT_S)
        raise


def known_error(error: BaseException | None) -> errors.OutriderError | None:
    """The error itself, or the first OutriderError of a group; otherwise None."""
    if isinstance(error, BaseExceptionGroup):
        found = (known_error(part) for part in error.exceptions)
        return next((part for part in found if part is not None), None)
    return error if isinstance(error, errors.OutriderError) else None


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.OutriderError) -> None:
    status = status_of(error)
    if status.code == code_pb2.INTERNAL:
        log.error("call_failed", error=str(error), exc_info=error)
    elif error.shown != str(error):
        log.warning("call_refused", why=str(error))
    await _end(context, status)


_CLIENT_GONE = status_pb2.Status(code=code_pb2.CANCELLED, message="a message could not be sent")


async def _end(context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status) -> None:
    """Ends the call and returns; gRPC remembers that the call is over.

    The status is sent after all written messages. If the client does not read, gRPC keeps it until
    the client reads or disconnects; this function does not wait for that. gRPC also keeps the error
    that `abort` raises, with every frame in its traceback. The traceback is dropped, because these
    frames may hold a rejected message of megabytes.
    """
    try:
        async with asyncio.timeout(_STATUS_WAIT_S):
            await context.abort_with_status(rpc_status.to_status(status))  # type: ignore[attr-defined]
    except TimeoutError:
        pass
    except grpc.aio.AbortError as aborted:
        aborted.__traceback__ = aborted.__context__ = None
    except grpc.aio.InternalError:  # the client has gone
        pass
