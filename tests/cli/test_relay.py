"""Relay: delivers data unchanged after the delay, and injects faults."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from outrider.cli.relay import End, Relay

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def relayed(handle: Handler, delay_s: float = 0.0) -> AsyncIterator[Relay]:
    """A relay in front of a server that runs `handle` for each connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Relay("127.0.0.1", 0, "127.0.0.1", port, delay_s) as relay:
            yield relay


@contextlib.asynccontextmanager
async def connected(relay: Relay) -> AsyncIterator[Ends]:
    reader, writer = await asyncio.open_connection(relay.host, relay.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


async def trip_s(ends: Ends, size: int = 1) -> float:
    """Round-trip time in seconds."""
    reader, writer = ends
    started_at = time.monotonic()
    writer.write(b"x" * size)
    assert await reader.readexactly(size) == b"x" * size
    return time.monotonic() - started_at


async def answer(ends: Ends, data: bytes) -> bytes:
    """Sends `data` and its end; returns everything received."""
    reader, writer = ends

    async def send() -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        return await reader.read()


@pytest.mark.parametrize("delay_s", [0.0, 0.05])
async def test_megabytes_arrive_in_order(delay_s: float) -> None:
    """Also with many chunks in flight at a time."""
    data = random.Random(0).randbytes(8 << 20)
    async with relayed(echo, delay_s) as relay, connected(relay) as ends:
        assert await answer(ends, data) == data


async def test_small_messages_keep_their_order() -> None:
    """Also while the delay falls."""
    async with relayed(echo, 0.05) as relay, connected(relay) as (reader, writer):
        for number in range(200):
            relay.delay_s = 0.05 if number % 2 else 0.0
            writer.write(struct.pack("<I", number))
            await asyncio.sleep(0)
        received = await reader.readexactly(800)
    assert list(struct.unpack("<200I", received)) == list(range(200))


async def test_delay_is_a_minimum_per_direction_and_may_change() -> None:
    """No upper bound is tested: the machine may be busy."""
    async with relayed(echo, 0.02) as relay, connected(relay) as ends:
        assert await trip_s(ends) >= 0.04
        relay.delay_s = 0.06
        assert await trip_s(ends) >= 0.12
        assert await trip_s(ends, 200_000) >= 0.12
        relay.delay_s = 0.0
        assert await trip_s(ends) >= 0.0


@pytest.mark.slow
@pytest.mark.timeout(100)
async def test_delays_overlap() -> None:
    """Many messages are in flight at a time: in sequence they would take two minutes."""
    async with relayed(echo, 1.0) as relay, connected(relay) as (reader, writer):
        for _ in range(60):
            writer.write(b"x")
            await asyncio.sleep(0.002)
        assert await reader.readexactly(60) == b"x" * 60


async def test_a_half_closed_end_still_reads() -> None:
    """The half-close follows the last bytes; the answer still arrives."""

    async def sum_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(str(len(await reader.read())).encode())

    async with relayed(sum_up, 0.02) as relay, connected(relay) as ends:
        assert await answer(ends, b"x" * 300_000) == b"300000"


async def test_the_far_end_may_close_first() -> None:
    """Its data and its half-close arrive while this end still writes."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.write_eof()
        assert await reader.read() == b"and you"

    async with relayed(greet, 0.02) as relay, connected(relay) as (reader, writer):
        assert await reader.read() == b"hello"
        writer.write(b"and you")
        writer.write_eof()


@pytest.mark.parametrize("breaks_near", [True, False])
async def test_a_reset_of_one_end_closes_the_other(breaks_near: bool) -> None:
    """From either side; other connections stay open."""
    far: asyncio.Queue[Ends] = asyncio.Queue()
    ended = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far.put_nowait((reader, writer))
        await ended.wait()

    async with relayed(hold, 0.01) as relay, contextlib.AsyncExitStack() as stack:
        near = await stack.enter_async_context(connected(relay))
        broken = await far.get()
        other = await stack.enter_async_context(connected(relay))
        other_far = await far.get()
        (_, breaking), (reader, _) = (near, broken) if breaks_near else (broken, near)
        raw = breaking.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        breaking.transport.abort()
        assert await reader.read() == b""
        other[1].write(b"x")
        assert await other_far[0].readexactly(1) == b"x"
        ended.set()


async def test_target_unreachable() -> None:
    """The client's connection is closed; the relay keeps listening."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with Relay("127.0.0.1", 0, "127.0.0.1", port, 0.0) as relay:
            for _ in range(2):
                async with connected(relay) as (reader, _):
                    assert await reader.read() == b""


async def test_leaving_closes_connections_with_data_in_flight() -> None:
    async with relayed(echo, 30.0) as relay:
        reader, writer = await asyncio.open_connection(relay.host, relay.port)
        writer.write(b"x" * 100_000)
        await writer.drain()
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()


async def silent(reader: asyncio.StreamReader, seconds: float = 0.2) -> bool:
    """Whether nothing arrives within the time, neither bytes nor an end."""
    try:
        async with asyncio.timeout(seconds):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def broken(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends without further bytes."""
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionResetError):
            return await reader.read() == b""
    return True


async def test_hold_stalls_and_release_delivers() -> None:
    """Bytes and new connections are stalled, then delivered in order."""
    async with relayed(echo) as relay, connected(relay) as (reader, writer):
        await trip_s((reader, writer))
        relay.hold()
        writer.write(b"abc")
        async with connected(relay) as (later_reader, later_writer):
            later_writer.write(b"later")
            assert await silent(reader)
            assert await silent(later_reader)
            assert relay.num_connected == 1
            writer.write(b"def")
            relay.release()
            assert await reader.readexactly(6) == b"abcdef"
            assert await later_reader.readexactly(5) == b"later"
            assert relay.num_connected == 2


@pytest.mark.parametrize("held", [False, True])
async def test_a_reset_breaks_every_connection(held: bool) -> None:
    """At both ends, with data in flight; a new connection works at once."""
    far_broken: list[bool] = []
    is_read, is_broken = asyncio.Event(), asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(1) == b"1":
            is_read.set()
            far_broken.append(await broken(reader))
            is_broken.set()
        writer.write(b"hello")

    async with relayed(listen) as relay:
        async with connected(relay) as (reader, writer):
            writer.write(b"1")
            await is_read.wait()
            if held:
                relay.hold()
                writer.write(b"lost")
                await asyncio.sleep(0.1)
            relay.reset()
            relay.release()
            assert await broken(reader)
        async with connected(relay) as (reader, writer):
            writer.write(b"2")
            assert await reader.readexactly(5) == b"hello"
        await is_broken.wait()
        assert far_broken == [True]


async def test_refuses_closes_new_connections() -> None:
    """Until it is unset."""
    async with relayed(echo) as relay:
        relay.refuses = True
        relay.reset()
        async with connected(relay) as (reader, _):
            assert await broken(reader)
        relay.refuses = False
        async with connected(relay) as ends:
            await trip_s(ends)


async def test_half_close_of_the_near_end() -> None:
    """Its reader sees the end; its data still arrives; the answer is lost."""
    received: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            received.append(data)
            writer.write(b"answer")
            await writer.drain()

    async with relayed(listen) as relay, connected(relay) as (reader, writer):
        writer.write(b"a")
        assert await reader.readexactly(6) == b"answer"
        relay.end(End.NEAR)
        assert await broken(reader)
        writer.write(b"b")
        while b"".join(received) != b"ab":  # noqa: ASYNC110 (not ours to set)
            await asyncio.sleep(0.01)


async def test_half_close_of_the_far_end() -> None:
    """The server sees the end and may still answer; data of the client is lost."""
    async with relayed(echo) as relay, connected(relay) as (reader, writer):
        await trip_s((reader, writer))
        relay.end(End.FAR)
        writer.write(b"lost")
        assert await broken(reader)


async def test_retarget() -> None:
    """New connections go to the new target, also to a unix socket."""

    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read(1)).upper())
        writer.close()

    async with relayed(echo) as relay, connected(relay) as ends:
        await trip_s(ends)
        with tempfile.TemporaryDirectory() as directory:
            path = str(Path(directory, "s"))
            async with await asyncio.start_unix_server(shout, path):
                relay.retarget(path, 0)
                async with connected(relay) as (reader, writer):
                    writer.write(b"x")
                    assert await reader.readexactly(1) == b"X"
        await trip_s(ends)
