"""TCP relay that adds latency or injects faults, for benchmarks, chaos runs and tests.

It delays data, stalls, closes one direction or resets connections, without privileges (unlike
`tc netem`). Protocol-agnostic. Runs on the event loop.
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
# Limit of chunks in flight per direction, 256 MiB if all are full. Beyond it the relay stops
# reading, so that TCP's and gRPC's flow control take over.
_MAX_CHUNKS = 4_096
# SO_LINGER value with which closing a socket sends RST instead of FIN.
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class End(Enum):
    """End of a relayed connection. NEAR: the client of the relay. FAR: the relay's target."""

    NEAR = "near"
    FAR = "far"


@dataclass(eq=False)
class _Connection:
    task: asyncio.Task[None]
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    # Writers closed by `Relay.end`: data for them is dropped.
    ended: set[asyncio.StreamWriter] = field(default_factory=set)


class Relay:
    """Listens on `host`:`port` and connects each client to the target; an async context manager.

    `port` 0: a free one, in `port` after entering. `delay_s`: minimum delay per direction; may be
    changed at any time, for data received from then on. Order and bandwidth are preserved: many
    chunks are in flight at a time. A half-close is passed on after the last bytes. A broken
    connection closes the other end at once and drops data in flight.

    `refuses`: new connections are closed at once. A `target_host` that is an absolute path is a
    unix socket; its port is ignored.
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
        tasks = [connection.task for connection in self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def num_connected(self) -> int:
        """Number of connections to the target that are open."""
        return sum(connection.far is not None for connection in self._connections)

    def retarget(self, host: str, port: int) -> None:
        """Sets the target of new connections; open connections stay as they are."""
        self._target = (host, port)

    def hold(self) -> None:
        """Stalls data in both directions and new connections, without closing any."""
        self._flows.clear()

    def release(self) -> None:
        """Ends `hold`: delivers stalled data."""
        self._flows.set()

    def end(self, end: End) -> None:
        """Half-closes every connection towards that end; the other direction stays open."""
        for connection in self._connections:
            writer = connection.near if end is End.NEAR else connection.far
            if writer is not None and writer not in connection.ended:
                connection.ended.add(writer)
                with contextlib.suppress(OSError):  # already broken
                    writer.write_eof()

    def reset(self) -> None:
        """Resets every connection at both ends (RST); data in flight is lost."""
        for connection in self._connections:
            for writer in (connection.near, connection.far):
                if writer is not None:
                    _reset(writer)
            connection.task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs connection callbacks as tasks"
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
            pass  # one end broke: the other is closed too
        finally:
            far_writer.close()

    async def _direction(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection
    ) -> None:
        in_flight: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_CHUNKS)

        async def receive() -> None:
            while True:
                data = await reader.read(_CHUNK_BYTES)
                await in_flight.put((time.monotonic() + self.delay_s, data))
                if not data:
                    return

        async def deliver() -> None:
            while True:
                due_at, data = await in_flight.get()
                while (left_s := due_at - time.monotonic()) > 0:  # noqa: ASYNC110 (sleep may end early)
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
            tasks.create_task(receive())
            tasks.create_task(deliver())


async def _connected(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if host.startswith("/"):
        return await asyncio.open_unix_connection(host)
    return await asyncio.open_connection(host, port)


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # already broken
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.transport.abort()
