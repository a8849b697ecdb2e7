"""Container probes like the kubelet's: gRPC, HTTP, TCP."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


@dataclass(frozen=True)
class Probe:
    """A probe of a manifest (`asks`). Never raises: a failed probe is False."""

    asks: dict[str, Any]
    address: str
    ports: dict[str | int, int]

    @property
    def period_s(self) -> float:
        return float(self.asks.get("periodSeconds", 10))

    @property
    def failure_threshold(self) -> int:
        return int(self.asks.get("failureThreshold", 3))

    async def ask(self) -> bool:
        timeout_s = float(self.asks.get("timeoutSeconds", 1))
        with contextlib.suppress(TimeoutError, OSError, grpc.aio.AioRpcError):
            async with asyncio.timeout(timeout_s):
                if "grpc" in self.asks:
                    return await self._grpc(timeout_s)
                if "httpGet" in self.asks:
                    return await self._http()
                return await self._tcp()
        return False

    async def _grpc(self, timeout_s: float) -> bool:
        port, service = self.asks["grpc"]["port"], self.asks["grpc"].get("service", "")
        async with grpc.aio.insecure_channel(f"{self.address}:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await stub.Check(request, timeout=timeout_s)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def _http(self) -> bool:
        asks = self.asks["httpGet"]
        reader, writer = await asyncio.open_connection(self.address, self.ports[asks["port"]])
        writer.write(f"GET {asks['path']} HTTP/1.0\r\n\r\n".encode())
        status = (await reader.readline()).split()
        writer.close()
        return len(status) > 1 and status[1][:1] in (b"2", b"3")

    async def _tcp(self) -> bool:
        _, writer = await asyncio.open_connection(
            self.address, self.ports[self.asks["tcpSocket"]["port"]]
        )
        writer.close()
        return True
