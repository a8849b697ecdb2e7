"""Load of `outrider bench swap`: streams that compare every output with the one without a draft."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.client import AsyncClient
from outrider.errors import CallFailed, InternalError
from outrider.v1 import orchestrator_pb2

PHASES = ("old", "new joins", "new", "bad joins", "after")


@dataclass
class Load:
    """Closed loop of streams over all orchestrators; `phase` labels what ends now."""

    clients: Sequence[AsyncClient]
    requests: Sequence[orchestrator_pb2.GenerateRequest]
    expected: Sequence[list[int]]
    samples: list[dict[str, Any]]
    phase: str = PHASES[0]
    began_at: float = field(default_factory=time.monotonic)

    @contextlib.asynccontextmanager
    async def running(self, num_streams: int) -> AsyncIterator[None]:
        """Runs the streams for the block; they finish their last output."""
        numbers, stop = itertools.count(), asyncio.Event()

        async def stream() -> None:
            while not stop.is_set():
                await self._generate(next(numbers))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_streams):
                tasks.create_task(stream())
            try:
                yield
            finally:
                stop.set()

    async def _generate(self, number: int) -> None:
        place = number % len(self.requests)
        sample: dict[str, Any] = {"number": number, "request": place}
        try:
            client = self.clients[number % len(self.clients)]
            output = await client.stream(self.requests[place]).result()
        except (CallFailed, InternalError) as error:
            sample["error"] = str(error)
        else:
            stats = output.speculation
            sample |= {
                "is_equal": output.token_ids == self.expected[place],
                "num_tokens": len(output.token_ids),
                "num_accepted": stats.num_accepted_tokens,
                "num_rejected": stats.num_rejected_tokens,
                "num_drafts": stats.num_drafts,
                "num_rounds": stats.num_rounds,
            }
        sample |= {"phase": self.phase, "ended_s": round(time.monotonic() - self.began_at, 3)}
        self.samples.append(sample)


async def without_draft(
    client: AsyncClient, request: orchestrator_pb2.GenerateRequest
) -> list[int]:
    """The output of the request with γ = 0. Raises CallFailed."""
    plain = orchestrator_pb2.GenerateRequest()
    plain.CopyFrom(request)
    plain.gamma = 0
    return (await client.stream(plain).result()).token_ids
