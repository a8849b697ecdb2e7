"""A TCP relay that makes a link longer: what goes in at one end comes out later at the other.

For benchmarks and tests; where the kernel has no delays of its own. Knows nothing of what it
carries. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType

_CHUNK_BYTES = 65_536
# Chunks under way in one direction: bounded, 256 MiB of full ones. More than that is not read, so
# gRPC's flow control takes over.
_MAX_CHUNKS = 4_096


class Relay:
    """Listens on `host`:`port` (0: a free one, see `port`) and connects each caller to the target.

    `delay_s`, in each direction, may be changed at any time; it holds for what comes in from then
    on. It is the least: the loop and the sockets add to it. Order is kept, and so is bandwidth:
    many chunks are under way at a time. An end that is closed for writing is passed on behind its
    last bytes; one that breaks off ends the other at once, without what was under way.
    """

    def __init__(
        self, host: str, port: int, target_host: str, target_port: int, delay_s: float
    ) -> None:
        self.delay_s = delay_s
        self.host, self.port = host, port
        self._target = (target_host, target_port)
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()

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
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs callbacks of connections as tasks"
        self._calls.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._carry(reader, writer)
        finally:
            self._calls.discard(task)
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._direction(reader, far_writer))
                tasks.create_task(self._direction(far_reader, writer))
        except* OSError:
            pass  # one end broke off: the other is closed too
        finally:
            far_writer.close()

    async def _direction(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(take())
            tasks.create_task(give())
