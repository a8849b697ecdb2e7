"""gRPC's edges shared by the three servers: status of errors, channel settings.

The only place where an error of `outrider.errors` becomes a gRPC status. Knows no service's logic.
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

log = structlog.get_logger()

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# A status travels in HTTP/2 headers, of which peers take 8 KiB: with more the code is lost, too.
MAX_STATUS_CHARS = 1_000
# A status that cannot be sent for so long is left to gRPC.
_STATUS_WAIT_S = 2.0
_LOOKS_PER_TIMEOUT = 10

_MESSAGE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_MESSAGE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    # Also the least time that gRPC gives a connection to be made, handshake included.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# Between the tiers: streams with heartbeats (outrider.runtime.heartbeat), and calls with deadlines.
TIER_CHANNEL_OPTIONS = _CHANNEL_OPTIONS
# Of callers: what servers and proxies of default settings take for ever, a ping in five minutes.
CALLER_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_CHANNEL_OPTIONS,
    ("grpc.keepalive_time_ms", 305_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
)

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


# Every status that one of our calls ends with.
STATUS_NAMES: tuple[str, ...] = (
    "OK",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "UNKNOWN",
    "INTERNAL",
    *dict.fromkeys(str(code_pb2.Code.Name(code)) for _, code in _STATUS if code),
)


def status_of(error: errors.OutriderError) -> status_pb2.Status:
    """The rich status of an error: a field violation or a retry hint where there is one."""
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
    """Of the status that a call ends with by this error; None: it ended well."""
    if error is None:
        return "OK"
    known = known_error(error) if isinstance(error, BaseExceptionGroup) else error
    if isinstance(known, errors.OutriderError):
        return str(code_pb2.Code.Name(status_of(known).code))
    if _has_gone(error):
        return "CANCELLED"
    return "INTERNAL" if _is_defect(error) else "UNKNOWN"


def _has_gone(error: BaseException) -> bool:
    """A write to a caller that has gone fails before the call is cancelled, in groups of groups."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_has_gone, error.exceptions))
    return isinstance(error, (asyncio.CancelledError, grpc.aio.InternalError))


def _is_defect(error: BaseException) -> bool:
    """Of ours, and not of gRPC's."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_defect, error.exceptions))
    return isinstance(error, Exception) and not isinstance(error, grpc.aio.BaseError)


def _short(text: str) -> str:
    return text if len(text) <= MAX_STATUS_CHARS else f"{text[:MAX_STATUS_CHARS]} …"


@contextlib.asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Ends the call with the status of an OutriderError raised inside, alone or by a TaskGroup.

    Ends it as CANCELLED where a write failed: the client has gone; as INTERNAL by whatever else was
    raised, of which the client is told nothing. Drops the traceback of an
    error that ends here: from Python 3.12 on it is part of a reference cycle through the frames of
    this context manager, and keeps a refused message of megabytes until the collector runs.
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
    """gRPC would send the exception's own text."""
    defect = errors.InternalError("a defect of this service; its log has more", repr(error))
    defect.__cause__ = error
    return defect


class StreamWriter:
    """Writes the messages of a call, which can be ended by a status whenever a write is cancelled.

    gRPC sends the call's metadata with the first message. Where that write is cancelled on its way,
    gRPC counts the metadata as unsent and sends it again with the status; its core refuses both,
    and the client hears nothing before its deadline. So the metadata goes first, uncancelled.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._has_begun = False
        self._is_writing = False
        self._num_written = 0
        # Seconds of the event loop's clock; before the first message those of this object's start.
        self._written_at = asyncio.get_running_loop().time()
        self._turn = asyncio.Lock()

    async def write(self, message: Any) -> None:
        """Raises grpc.aio.InternalError where the client has gone."""
        async with self._turn:
            self._is_writing = True
            if not self._has_begun:
                self._has_begun = True
                await _uncancelled(self._context.send_initial_metadata(()))
            await self._context.write(message)
            self._is_writing = False
            self._num_written += 1
            self._written_at = asyncio.get_running_loop().time()

    @contextlib.asynccontextmanager
    async def beating(self, heartbeat: Any, interval_ms: int) -> AsyncIterator[None]:
        """Writes `heartbeat` whenever nothing was written for the interval; 0: never.

        Messages serve as heartbeats, too: with 1,000 streams the rest would cost CPU time.
        """
        beating = asyncio.create_task(self._beat(heartbeat, interval_ms))
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self, heartbeat: Any, interval_ms: int) -> None:
        loop, interval_s = asyncio.get_running_loop(), interval_ms / 1000
        while interval_s:
            wait_s = self._written_at + interval_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif self._is_writing:
                await asyncio.sleep(interval_s)
            else:
                await self.write(heartbeat)

    @contextlib.asynccontextmanager
    async def watched(self, timeout_s: float) -> AsyncIterator[None]:
        """Cancels the block once a write has waited for `timeout_s`: the client does not read.

        Raises ClientStalled, in a group.
        """
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch(timeout_s), name="writes")
            try:
                yield
            finally:
                watching.cancel()

    async def _watch(self, timeout_s: float) -> None:
        """Counts looks, not seconds: that a busy loop comes late is not the client's fault."""
        num_looks, num_written = 0, -1
        while num_looks < _LOOKS_PER_TIMEOUT:
            await asyncio.sleep(timeout_s / _LOOKS_PER_TIMEOUT)
            is_same = self._is_writing and num_written == self._num_written
            num_looks, num_written = num_looks + 1 if is_same else 0, self._num_written
        raise errors.ClientStalled(
            f"the client has not read its stream for {timeout_s:g} s (write_timeout_s); "
            "a named session can be resumed"
        )


async def _uncancelled(work: Coroutine[Any, Any, None]) -> None:
    """For what ends by itself and soon: a cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    # Where the client has gone it fails, which nobody hears who has been cancelled meanwhile.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=_STATUS_WAIT_S)
        raise


def known_error(error: BaseException | None) -> errors.OutriderError | None:
    """The error itself, or the first in a group, that is an OutriderError."""
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
    """Returns: gRPC itself remembers that the call is over.

    A status is sent behind all that was written. Where the client does not read, gRPC keeps it
    until the client does or has gone, and nothing of ours waits for that.
    It keeps what `abort` raises, and that every frame it came through. What those hold, a refused
    message of megabytes for instance, would wait for the collector.
    """
    try:
        async with asyncio.timeout(_STATUS_WAIT_S):
            await context.abort_with_status(rpc_status.to_status(status))  # type: ignore[attr-defined]
    except TimeoutError:
        pass
    except grpc.aio.AbortError as aborted:
        aborted.__traceback__ = aborted.__context__ = None
    except grpc.aio.InternalError:  # the caller has gone
        pass
