"""One Generate call as its caller sees it: what came, when, and how it ended.

Knows the wire; not why a call is made, nor whether it may end as it did.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from outrider.errors import Unavailable
from outrider.runtime.heartbeat import CLIENT_HEARTBEAT_MS, listening
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc

# Longer than it takes to move to another target (detection 3 s, one prefill, busy machine).
PATIENCE_S = 12.0
# Of a whole generation, from its first call on.
GIVE_UP_S = 120.0
# In the trailers of every error that one of our servers has raised (outrider.runtime.grpc_status).
_STATUS_DETAILS = "grpc-status-details-bin"


@dataclass
class Attempt:
    """One Generate call, and how it ended: with a result, by an error, or left by its caller."""

    orchestrator: int
    began_at: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    result: orchestrator_pb2.GenerateResult | None = None
    code: grpc.StatusCode | None = None
    why: str = ""
    # The status is an answer of the orchestrator, not the loss of the connection.
    is_answer: bool = False
    has_left: bool = False
    is_silent: bool = False

    @property
    def is_finished(self) -> bool:
        """Whole: no stream that a stopping server cut short."""
        cancelled = orchestrator_pb2.FINISH_REASON_CANCELLED
        return self.result is not None and self.result.finish_reason != cancelled

    def overlaps(self, other: Attempt) -> bool:
        """Both were sent tokens while the other was; not one after the other."""
        if not self.times or not other.times:
            return False
        return self.times[0] < other.times[-1] and other.times[0] < self.times[-1]


class Orchestrators:
    """A caller's connections; one for each orchestrator, shared by all callers."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self._stubs = [orchestrator_pb2_grpc.OrchestratorServiceStub(c) for c in channels]

    def __len__(self) -> int:
        return len(self._stubs)

    def __getitem__(self, number: int) -> Any:
        return self._stubs[number]

    def after(self, number: int) -> int:
        return (number + 1) % len(self._stubs)

    async def attempt(
        self,
        attempt: Attempt,
        request: orchestrator_pb2.GenerateRequest,
        leaves_at: int | None = None,
    ) -> None:
        """Makes the call and fills in what comes; `leaves_at`: tokens after which the caller goes.

        Raises nothing, but is cancelled.
        """
        request.heartbeat_ms = CLIENT_HEARTBEAT_MS
        call = self[attempt.orchestrator].Generate(request, timeout=GIVE_UP_S)
        chunks = listening(call)
        try:
            while leaves_at is None or len(attempt.token_ids) < leaves_at:
                async with asyncio.timeout(PATIENCE_S):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                if chunk.token_ids:
                    attempt.token_ids += chunk.token_ids
                    attempt.times.append(time.monotonic())
                if chunk.HasField("result"):
                    attempt.result = chunk.result
                    return
            attempt.has_left = True
        except TimeoutError:
            attempt.is_silent = True
        except Unavailable as error:
            attempt.code, attempt.why = grpc.StatusCode.UNAVAILABLE, str(error)
        except grpc.aio.AioRpcError as error:
            attempt.code, attempt.why = error.code(), " ".join((error.details() or "").split())
            trailers: Any = error.trailing_metadata() or ()
            attempt.is_answer = any(key == _STATUS_DETAILS for key, _ in trailers)
        finally:
            call.cancel()  # the server shall not go on for nobody
            await chunks.aclose()
