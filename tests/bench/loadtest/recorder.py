"""Two recorders of a load test's times: on the client's channel, and a proxy in front of the
orchestrator.

They record when requests and messages pass, independently of `outrider_bench.loadtest`. `python -m
tests.bench.loadtest.recorder HOST:PORT SECONDS` runs the proxy in a process of its own and prints
what passed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from outrider.runtime.grpc_server import SERVER_OPTIONS
from outrider.v1 import orchestrator_pb2_grpc


@dataclass
class CallTimes:
    """One Generate call: time.monotonic() of the request, each message with tokens, and the end."""

    asked: float
    times: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    ended: float = 0.0

    def note(self, message: Any) -> None:
        now = time.monotonic()
        if message.token_ids:
            self.times.append(now)
            self.num_tokens.append(len(message.token_ids))
        self.ended = now

    @property
    def ttft(self) -> float:
        return self.times[0] - self.asked

    @property
    def e2e(self) -> float:
        return self.ended - self.asked

    @property
    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / (sum(self.num_tokens) - 1)

    @property
    def gaps(self) -> list[float]:
        return list(np.diff(self.times))


def percentiles(values: list[float]) -> dict[str, float]:
    """p50 and p99 by sorting: value at (n - 1) · p of n values, linear between neighbours."""
    ordered, found = sorted(values), {}
    for percent in (50, 99):
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        found[f"p{percent}"] = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return found


class Recorder:
    """Wraps a client's channel and records its streams.

    Not an interceptor: those run in a task of their own, so a turn or more of the event loop later.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.seen: list[CallTimes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Recorded]:
        method: Any = self._channel.unary_stream(*args, **kwargs)

        def ask(*args: Any, **kwargs: Any) -> Recorded:
            seen = CallTimes(time.monotonic())
            self.seen.append(seen)
            return Recorded(method(*args, **kwargs), seen)

        return ask


class Recorded:
    """A recorded call, with the methods that the load test uses."""

    def __init__(self, call: Any, seen: CallTimes) -> None:
        self._call = call
        self._seen = seen

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for message in self._call:
            self._seen.note(message)
            yield message

    def cancel(self) -> None:
        self._call.cancel()


class Proxy(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Proxy between a client and an orchestrator."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self.seen: list[CallTimes] = []

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        seen = CallTimes(time.monotonic())
        self.seen.append(seen)
        async for message in self._stub.Generate(request):
            seen.note(message)
            yield message

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return await self._stub.GetModelInfo(request)

    async def DeleteSession(self, request: Any, context: Any) -> Any:
        return await self._stub.DeleteSession(request)


async def main(endpoint: str, seconds: float) -> None:
    """Serves for `seconds`, then prints the recorded calls as JSON."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        proxy = Proxy(orchestrator_pb2_grpc.OrchestratorServiceStub(channel))
        server = grpc.aio.server(options=SERVER_OPTIONS)
        orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(proxy, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"listening on 127.0.0.1:{port}", flush=True)
        await asyncio.sleep(seconds)
        await server.stop(1)
    calls = [
        {"ttft": s.ttft, "tpot": s.tpot, "e2e": s.e2e, "num_tokens": sum(s.num_tokens)}
        for s in proxy.seen
    ]
    print(json.dumps(calls), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
