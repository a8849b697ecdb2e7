"""TLS proxy for a server on a unix socket: the embedded Redis has no TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any


class TlsFront:
    """Forwards clients with a certificate of the authority to the socket."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._writers: set[asyncio.StreamWriter] = set()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.port = 0

    def use(self, ca: str, cert: str, key: str) -> None:
        """Certificates for new connections."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
        self._context = context

    def drop(self) -> None:
        """Aborts all connections, as a restarted server does."""
        for writer in self._writers:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[TlsFront]:
        # Asked at each handshake, so that `use` needs no new server.
        door = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        door.verify_mode = ssl.CERT_REQUIRED  # the one thing that a later context cannot change
        door.sni_callback = self._choose  # type: ignore[assignment]
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=door)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.drop()

    def _choose(self, connection: ssl.SSLObject, name: str | None, _: Any) -> None:
        connection.context = self._context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._socket_path)
        both = {writer, far_writer}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_pump(reader, far_writer))
                tasks.create_task(_pump(far_reader, writer))
        finally:
            self._writers -= both
            for each in both:
                each.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
