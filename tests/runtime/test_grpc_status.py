"""Status of a call whose handler fails, on a real server with a real client."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from outrider.errors import SessionNotFound
from outrider.runtime.grpc_status import StreamWriter, translated

METHOD = "/test.Service/Stream"
Handler = Callable[[Any], Awaitable[None]]


class Service(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def stream(request: bytes, context: Any) -> None:
            async with translated(context):
                await self._handler(context)

        return grpc.unary_stream_rpc_method_handler(stream)


@contextlib.asynccontextmanager
async def calling(handler: Handler) -> AsyncIterator[Any]:
    """A call to a server with this handler."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Service(handler),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.unary_stream(METHOD)(b"", timeout=60)
    await server.stop(0)


def logged_by_grpc(caplog: pytest.LogCaptureFixture) -> list[str]:
    """gRPC's errors; asyncio may log more because of other tests' closed loops."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("grpc")]


async def failed(context: Any) -> None:
    raise grpc.aio.InternalError("a write to a client that has gone")


async def failed_in_a_group(context: Any) -> None:
    raise ExceptionGroup("two writes", [grpc.aio.InternalError("gone")] * 2)


async def cancelled_write(writer: Any, num_turns: int) -> None:
    """Cancels the first write after `num_turns` iterations of the event loop."""
    writing = asyncio.create_task(writer.write(b"text"))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing


async def status_of(handler: Handler) -> grpc.StatusCode:
    """The final status of the call of a client that reads."""
    async with calling(handler) as call:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    return caught.value.code()


@pytest.mark.parametrize("handler", [failed, failed_in_a_group])
async def test_a_failed_write_ends_the_call(
    handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """CANCELLED for a client that still reads, and no traceback in the log."""
    with caplog.at_level(logging.ERROR):
        assert await status_of(handler) is grpc.StatusCode.CANCELLED
    assert logged_by_grpc(caplog) == []


async def test_a_client_that_disconnects_at_the_first_write_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    over = asyncio.Event()

    async def handler(context: Any) -> None:
        context.add_done_callback(lambda _: over.set())
        # gRPC's core has the metadata, and gRPC counts it as unsent.
        await cancelled_write(context, 1)
        await failed(context)

    with caplog.at_level(logging.ERROR):
        async with calling(handler) as call:
            await anext(aiter(call), None)
            call.cancel()
            await over.wait()
    assert logged_by_grpc(caplog) == []


@pytest.mark.parametrize("num_turns", range(6))
async def test_the_status_is_sent_after_a_cancelled_first_write(
    num_turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    """With a write on the context itself the client would get no status before its deadline."""

    async def handler(context: Any) -> None:
        await cancelled_write(StreamWriter(context), num_turns)
        raise SessionNotFound("no such session")

    with caplog.at_level(logging.ERROR):
        assert await status_of(handler) is grpc.StatusCode.NOT_FOUND
    assert logged_by_grpc(caplog) == []


async def test_a_cancelled_write_that_fails_logs_nothing() -> None:
    """The client disconnects while the write is cancelled; the failure must not be logged."""
    has_gone = asyncio.Event()

    class Context:
        async def send_initial_metadata(self, metadata: object) -> None:
            await has_gone.wait()
            raise grpc.aio.InternalError("gone")

    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    writing = asyncio.create_task(StreamWriter(Context()).write(b"text"))  # type: ignore[arg-type]
    for _ in range(3):
        await asyncio.sleep(0)
    writing.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    has_gone.set()
    with contextlib.suppress(asyncio.CancelledError):
        await writing
    del writing
    await asyncio.sleep(0)  # the loop drops its reference, too
    gc.collect()
    assert unhandled == []


def virtual_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose clock jumps to the next timer: waits take no time."""
    loop = asyncio.SelectorEventLoop()
    now, select = 0.0, loop._selector.select  # type: ignore[attr-defined]

    def jump(timeout: float | None) -> Any:
        nonlocal now
        now += timeout or 0.0
        return select(0)

    loop._selector.select = jump  # type: ignore[attr-defined]
    loop.time = lambda: now  # type: ignore[method-assign]
    return loop


def test_heartbeats_are_sent_only_when_nothing_else_is() -> None:
    sent: list[tuple[float, bytes]] = []

    class Context:
        async def send_initial_metadata(self, metadata: object) -> None:
            pass

        async def write(self, message: bytes) -> None:
            sent.append((asyncio.get_running_loop().time(), message))

    async def stream() -> None:
        writer = StreamWriter(Context())  # type: ignore[arg-type]
        async with writer.heartbeats(b"", 1_000):
            for _ in range(10):
                await asyncio.sleep(0.7)
                await writer.write(b"text")
            await asyncio.sleep(3.5)
            await writer.write(b"end")

    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(stream())
    assert [message for _, message in sent] == [b"text"] * 10 + [b""] * 3 + [b"end"]
    times_s = [0.0, *(at for at, _ in sent)]
    assert max(b - a for a, b in itertools.pairwise(times_s)) < 1.001
