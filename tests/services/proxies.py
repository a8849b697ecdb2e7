"""Proxies between client and server: a gRPC proxy and a connection balancer."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc


class StrictProxy(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """A gRPC proxy with default settings: it closes connections that ping without data."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.methods: list[str] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def pass_on(requests: Any, context: Any) -> None:
            call: Any = self._channel.stream_stream(details.method)(requests)
            async for answer in call:
                await context.write(answer)

        self.methods.append(details.method.rpartition("/")[2])
        return grpc.stream_stream_rpc_method_handler(pass_on)


@contextlib.asynccontextmanager
async def strict_proxy(endpoint: str) -> AsyncIterator[tuple[str, StrictProxy]]:
    """Its address."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        proxy, server = StrictProxy(channel), grpc.aio.server()
        server.add_generic_rpc_handlers((proxy,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}", proxy
        finally:
            await server.stop(0)


@contextlib.asynccontextmanager
async def balancer(endpoints: Sequence[str]) -> AsyncIterator[str]:
    """Address of a balancer that forwards each connection to the next endpoint, like a Service.

    The list of endpoints may grow meanwhile.
    """
    turns = itertools.count()
    tasks: set[asyncio.Task[Any]] = set()

    async def accept(near: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio runs callbacks of connections as tasks"
        tasks.add(task)
        host, _, port = endpoints[next(turns) % len(endpoints)].rpartition(":")
        with contextlib.suppress(OSError, asyncio.CancelledError):
            far, far_writer = await asyncio.open_connection(host, int(port))
            await asyncio.gather(_carry(near, far_writer), _carry(far, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
