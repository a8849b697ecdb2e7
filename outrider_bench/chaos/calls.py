"""One Generate call as its client sees it: tokens, times and how it ended.

`outrider_bench.chaos.client` decides whether a call may end that way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from outrider.client.connection import HEARTBEAT_MS, listening
from outrider.errors import Unavailable
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc

# Longest wait for a chunk. Longer than a failover to another target takes (detection 3 s, one
# prefill, busy machine).
CHUNK_TIMEOUT_S = 12.0
# Time limit of a generation, from its first call.
GENERATION_TIMEOUT_S = 120.0
# Trailer of every error raised by one of our servers (outrider.runtime.grpc_status).
_STATUS_DETAILS = "grpc-status-details-bin"


@dataclass
class Attempt:
    """One Generate call. Ends with a result, an error, a timeout or a client's disconnect."""

    orchestrator: int
    began_at: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    result: orchestrator_pb2.GenerateResult | None = None
    code: grpc.StatusCode | None = None
    detail: str = ""
    # The orchestrator sent the status; the connection was not lost.
    is_from_server: bool = False
    has_disconnected: bool = False
    has_timed_out: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete: a stopping server did not cancel it."""
        cancelled = orchestrator_pb2.FINISH_REASON_CANCELLED
        return self.result is not None and self.result.finish_reason != cancelled

    def overlaps(self, other: Attempt) -> bool:
        """Whether both calls received tokens during the same time."""
        if not self.times or not other.times:
            return False
        return self.times[0] < other.times[-1] and other.times[0] < self.times[-1]


class OrchestratorStubs:
    """Client stubs: one connection to each orchestrator, shared by all clients."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self._stubs = [orchestrator_pb2_grpc.OrchestratorServiceStub(c) for c in channels]

    def __len__(self) -> int:
        return len(self._stubs)

    def __getitem__(self, number: int) -> Any:
        return self._stubs[number]

    def after(self, number: int) -> int:
        """Index of the next orchestrator, round robin."""
        return (number + 1) % len(self._stubs)

    async def call(
        self,
        attempt: Attempt,
        request: orchestrator_pb2.GenerateRequest,
        disconnects_at: int | None = None,
    ) -> None:
        """Makes the call and fills in `attempt`. Raises nothing except cancellation.

        `disconnects_at`: number of tokens after which the client disconnects; None: never.
        """
        request.heartbeat_ms = HEARTBEAT_MS
        call = self[attempt.orchestrator].Generate(request, timeout=GENERATION_TIMEOUT_S)
        chunks = listening(call)
        try:
            while disconnects_at is None or len(attempt.token_ids) < disconnects_at:
                async with asyncio.timeout(CHUNK_TIMEOUT_S):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                if chunk.token_ids:
                    attempt.token_ids += chunk.token_ids
                    attempt.times.append(time.monotonic())
                if chunk.HasField("result"):
                    attempt.result = chunk.result
                    return
            attempt.has_disconnected = True
        except TimeoutError:
            attempt.has_timed_out = True
        except Unavailable as error:
            attempt.code, attempt.detail = grpc.StatusCode.UNAVAILABLE, str(error)
        except grpc.aio.AioRpcError as error:
            attempt.code, attempt.detail = error.code(), " ".join((error.details() or "").split())
            trailers: Any = error.trailing_metadata() or ()
            attempt.is_from_server = any(key == _STATUS_DETAILS for key, _ in trailers)
        finally:
            call.cancel()  # otherwise the server would continue
            await chunks.aclose()
