"""HTTP server for scrapers: GET of one path, on a thread and event loop of its own.

A connection needs no thread, so idle connections are harmless. Above the maximum the oldest are
closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import urlsplit

import structlog

log = structlog.get_logger()

# Time for a scraper to send its request and to read the answer.
_REQUEST_TIMEOUT_S = 10.0
_MAX_CONNECTIONS = 256
_MAX_HEAD_BYTES = 16_384
_BACKLOG = 512
# A rejected request's remaining bytes are read, so that a TCP reset does not discard the answer.
_LINGER_S, _LINGER_BYTES = 1.0, 65_536

# From the Accept header to body and content type. Called on the server's thread.
Answer = Callable[[str], tuple[bytes, str]]


class ScrapeServer:
    """Call `start`, then `stop`; both on any thread."""

    def __init__(self, path: str, answer: Answer) -> None:
        self._path = path
        self._answer = answer
        # In order of arrival.
        self._connections: dict[asyncio.Task[None], None] = {}

    def start(self, host: str, port: int) -> int:
        """Starts listening and returns the port. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host.strip("[]"), port), family=family, backlog=_BACKLOG)
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(
            target=self._run, args=(listening,), name="metrics", daemon=True
        )
        self._thread.start()
        return int(listening.getsockname()[1])

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self, listening: socket.socket) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve(listening))

    async def _serve(self, listening: socket.socket) -> None:
        server = await asyncio.start_server(self._accept, sock=listening, limit=_MAX_HEAD_BYTES)
        await self._stopped.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs callbacks of connections as tasks"
        self._connections[task] = None
        if len(self._connections) > _MAX_CONNECTIONS:
            next(iter(self._connections)).cancel()
        try:
            with contextlib.suppress(
                OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
            ):
                async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    is_served = self._respond(head, writer)
                    await writer.drain()
                if not is_served:
                    async with asyncio.timeout(_LINGER_S):
                        await reader.read(_LINGER_BYTES)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            del self._connections[task]
            writer.close()

    def _respond(self, head: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answers the request. Returns whether it was a GET of the path."""
        words, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = words.partition(" ")
        path = urlsplit(rest.partition(" ")[0]).path
        if method != "GET":
            return _write(writer, HTTPStatus.NOT_IMPLEMENTED)
        if path != self._path:
            return _write(writer, HTTPStatus.NOT_FOUND)
        headers = {name.lower(): value for name, _, value in (x.partition(":") for x in lines)}
        try:
            body, kind = self._answer(headers.get("accept", "").strip())
        except Exception as error:  # a defect in a source: only this scrape fails
            log.error("scrape_failed", exc_info=error)
            return _write(writer, HTTPStatus.INTERNAL_SERVER_ERROR)
        _write(writer, HTTPStatus.OK, body, kind)
        return True


def _write(
    writer: asyncio.StreamWriter, status: HTTPStatus, body: bytes = b"", kind: str = "text/plain"
) -> bool:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode("latin-1") + body)
    return False
