"""A TCP relay: a link that is longer than it was, or that fails on purpose.

What goes in at one end comes out at the other, later; or not at all, or half of it, or the
connection breaks. For benchmarks, chaos runs and tests; where the kernel has no faults of its own
to lend. Knows nothing of what it carries, nor when which fault is due. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType

_CHUNK_BYTES = 65_536
# Chunks under way in one direction: bounded, 256 MiB of full ones. More than that is not read, so
# gRPC's flow control takes over.
_MAX_CHUNKS = 4_096
# With it, closing sends RST instead of FIN.
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class End(Enum):
    """NEAR: whoever connects to the relay. FAR: what it connects to."""

    NEAR = "near"
    FAR = "far"


@dataclass(eq=False)
class _Connection:
    task: asyncio.Task[None]
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    # Told that there is no more to come, while there is: that is lost.
    ended: set[asyncio.StreamWriter] = field(default_factory=set)


class Relay:
    """Listens on `host`:`port` (0: a free one, see `port`) and connects each caller to the target.

    `delay_s`, in each direction, may be changed at any time; it holds for what comes in from then
    on. It is the least: the loop and the sockets add to it. Order is kept, and so is bandwidth:
    many chunks are under way at a time. An end that is closed for writing is passed on behind its
    last bytes; one that breaks off ends the other at once, without what was under way.

    `refuses`: who connects now is sent away at once. A `target_host` that is an absolute path is
    a unix socket's; its port means nothing.
    """

    def __init__(
        self, host: str, port: int, target_host: str, target_port: int, delay_s: float
    ) -> None:
        self.delay_s = delay_s
        self.host, self.port = host, port
        self.refuses = False
        self._target = (target_host, target_port)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._flows = asyncio.Event()
        self._flows.set()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None, "it was entered"
        self._server.close()
        calls = [connection.task for connection in self._connections]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def num_connected(self) -> int:
        """Connections that reach the target now."""
        return sum(connection.far is not None for connection in self._connections)

    def retarget(self, host: str, port: int) -> None:
        """Who connects from now on is led there; connections that are up stay as they are."""
        self._target = (host, port)

    def hold(self) -> None:
        """Nothing arrives from now on, either way, nor does a new connection; nothing breaks."""
        self._flows.clear()

    def release(self) -> None:
        """What was held arrives now, late."""
        self._flows.set()

    def end(self, end: End) -> None:
        """Tells that end of every connection that no more will come; the other way stays open."""
        for connection in self._connections:
            writer = connection.near if end is End.NEAR else connection.far
            if writer is not None and writer not in connection.ended:
                connection.ended.add(writer)
                with contextlib.suppress(OSError):  # it is broken already
                    writer.write_eof()

    def reset(self) -> None:
        """Every connection breaks, at both ends (RST); what was under way is lost."""
        for connection in self._connections:
            for writer in (connection.near, connection.far):
                if writer is not None:
                    _reset(writer)
            connection.task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs callbacks of connections as tasks"
        connection = _Connection(task, writer)
        self._connections.add(connection)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                if not self.refuses:
                    await self._carry(reader, connection)
        finally:
            self._connections.discard(connection)
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        await self._flows.wait()
        far_reader, far_writer = await _connected(*self._target)
        connection.far = far_writer
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._direction(reader, far_writer, connection))
                tasks.create_task(self._direction(far_reader, connection.near, connection))
        except* OSError:
            pass  # one end broke off: the other is closed too
        finally:
            far_writer.close()

    async def _direction(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_CHUNKS)

        async def take() -> None:
            while True:
                data = await reader.read(_CHUNK_BYTES)
                await under_way.put((time.monotonic() + self.delay_s, data))
                if not data:
                    return

        async def give() -> None:
            while True:
                due_at, data = await under_way.get()
                while (left_s := due_at - time.monotonic()) > 0:  # noqa: ASYNC110 (it may wake early)
                    await asyncio.sleep(left_s)
                await self._flows.wait()
                if writer not in connection.ended:
                    if data:
                        writer.write(data)
                        await writer.drain()
                    else:
                        writer.write_eof()
                if not data:
                    return

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(take())
            tasks.create_task(give())


async def _connected(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if host.startswith("/"):
        return await asyncio.open_unix_connection(host)
    return await asyncio.open_connection(host, port)


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # it is broken already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.transport.abort()
